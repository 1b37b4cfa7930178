"""Pipeline parallelism: schedules as tables that are checked, drawn and run.

No jax here: `pipeline.split` and `pipeline.execute` are imported by their own names.
"""

from deepseek_jax.pipeline.schedule import Schedule, make_schedule
from deepseek_jax.pipeline.validate import Report, ScheduleError, validate

__all__ = ["Report", "Schedule", "ScheduleError", "make_schedule", "validate"]
