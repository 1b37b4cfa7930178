"""The reference page of all keys matches the annotations, and omits no key."""

import pathlib

from deepseek_jax.config import Config, default_config
from deepseek_jax.config.reference import page
from deepseek_jax.config.schema import fields_of

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_committed_page_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == page()


def test_the_page_has_every_key_that_a_config_file_can_set():
    text = page()
    for section, keys in default_config("tiny").items():
        for key in keys:
            assert f"`{section}.{key}`" in text


def test_every_field_has_a_line_of_documentation():
    for section in fields_of(Config):
        assert all(field.doc for field in fields_of(section.kind)), section.name
