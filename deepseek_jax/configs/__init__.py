"""A run of each preset; `--config NAME` finds them, and a config file of your own may start from one."""
