"""Python loads this at its start where this folder is on PYTHONPATH."""

import ft_cloud_hook  # noqa: F401
