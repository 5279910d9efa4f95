"""LIBERO with calibrated cameras and moved objects: --env.type=libero_calibrated."""

try:
    import lerobot  # noqa: F401  is it there?
except ImportError as error:
    raise ImportError(
        "lerobot_env_libero_calibrated is a plugin of LeRobot, which is not installed here; "
        "make its environment with plugins/setup.sh"
    ) from error

# LeRobot looks it up when this is imported
from .configuration_libero_calibrated import LiberoCalibratedEnv

__all__ = ["LiberoCalibratedEnv"]
