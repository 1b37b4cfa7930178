"""Parts that a config names as "package.module:name": an own routing rule, bias rule or attention (no jax here).

The module has to be importable; importing it runs it, so a work directory that names one is as trusted as the module.
"""

import functools
import importlib
from typing import Any

from deepseek_jax.config import ConfigError


@functools.cache
def load_object(key: str, name: str) -> Any:
    """The object that config key `key` names as "package.module:name".

    Raises:
      ConfigError: no such module or name, or the module fails to import.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module does
        raise ConfigError(f"{key}={name!r}: module {module_name} cannot be imported ({type(error).__name__}: {error}); "
                          "start from a folder where it can, or install it.") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(f"{key}={name!r}: module {module_name} has no {attribute}.") from None
