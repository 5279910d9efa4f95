"""Checkpoints of PARA on LIBERO as a LeRobot policy: --policy.type=para."""

try:
    import lerobot  # noqa: F401  is it there?
except ImportError as error:
    raise ImportError(
        "lerobot_policy_para is a plugin of LeRobot, which is not installed here; "
        "make its environment with plugins/setup.sh"
    ) from error

# what LeRobot looks up is registered when these are imported
from .configuration_para import ParaConfig
from .processor_para import UprightImages, make_para_pre_post_processors

__all__ = ["ParaConfig", "UprightImages", "make_para_pre_post_processors"]
