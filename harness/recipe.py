"""What a training was resolved to. Flags may say "auto"; a recipe says what that was."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a training's weights besides the policy's config, and how often it saves.

    It is printed when the training starts, and stored as "resolved" in the run's config.json and in
    each checkpoint.
    """

    model_type: str
    preset: str  # None for a policy without sizes
    dataset: str
    train_demos: int
    val_demos: int
    train_frames: int
    mirror: bool
    turn_back: bool
    shift_aug: float  # pixels
    backbone: str  # identity: name and weights of the frozen features
    init_from: str  # None: from new weights
    freeze_steps: int  # in which the volume head stays as it is
    seed: int
    max_steps: int
    batch_size: int  # over all processes
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    device: str  # of this process
    precision: str  # "fp32" or "bf16"
    compile: bool
    processes: int
    val_every: int
    val_samples: int
    save_every: int
    text: str = "none"  # how instructions are read
    patience: int = 0  # validations without a lower error after which training ends; 0: never
    cooldown: int = 0  # steps at its end in which the learning rate goes to zero

    def __str__(self):
        size = f" ({self.preset})" if self.preset else ""
        further = f", from {self.init_from}" if self.init_from else ""
        several = f" in each of {self.processes} processes" if self.processes > 1 else ""
        demos = f"{self.train_demos} + {self.val_demos} demonstrations"
        length = f"{self.max_steps} steps of {self.batch_size} samples"
        if self.patience:
            length = f"at most {length}, patience {self.patience} x {self.val_every} steps"
        return (
            f"  policy {self.model_type}{size}{further}, features {self.backbone}\n"
            f"  data {self.dataset}: {demos}, {self.train_frames} training frames\n"
            f"  {length}, learning rate {self.lr:g}, seed {self.seed}, "
            f"{self.precision} on {self.device}{several}"
        )
