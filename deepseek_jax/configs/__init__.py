"""Configs by name for `--config NAME`; your own config file may start from one."""
