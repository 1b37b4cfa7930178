"""The user's own parts, given in a config as "package.module:name": routing rule, bias rule or attention (no jax here).

The module has to be importable; importing it runs its code, so only load work directories whose modules you trust.
"""

import functools
import importlib
from typing import Any

from deepseek_jax.config import ConfigError


@functools.cache
def load_object(key: str, name: str) -> Any:
    """The object given in config key `key` as "package.module:name".

    Raises:
      ConfigError: no such module or name, or the module fails to import.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module may raise anything
        raise ConfigError(f"{key}={name!r}: module {module_name} cannot be imported ({type(error).__name__}: {error}); "
                          "start from a folder where it can, or install it.") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(f"{key}={name!r}: module {module_name} has no {attribute}.") from None
