"""Make frozen convolutional networks faster while they stay modules, which move with `.to()` as a
frozen trace does not.

All functions check their result on an example input, and leave a network as it was if its maps
would change.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nets.convolution import POINTWISE, OneDnnConvolution, can_replace, has_onednn

TOLERANCE = 1e-4  # of a map's largest value: batch norms folded into kernels round differently


def agree(maps, others):
    """True if two lists of maps are the same up to rounding."""
    same = len(maps) == len(others) and all(a.shape == b.shape for a, b in zip(maps, others))
    return same and all(
        (a - b).abs().max() <= TOLERANCE * a.abs().max().clamp(min=1) for a, b in zip(maps, others)
    )


@torch.inference_mode()
def without_tail(model, example):
    """Remove the modules of a network that run after the last of its maps is made.

    model: returns a list of maps; example: an input. Returns a shortened copy, or `model` itself
    where that would change the maps.
    """
    # the modules in the order in which they start, and for each output how many had started by
    # then; the output is kept too, so that no other tensor gets its id
    started, made = [], {}
    hooks = []
    for module in list(model.modules())[1:]:
        hooks.append(module.register_forward_pre_hook(lambda m, _: started.append(m)))
        hooks.append(
            module.register_forward_hook(
                lambda m, _, out: made.update({id(out): (len(started), out)})
            )
        )
    maps = model(example)
    for hook in hooks:
        hook.remove()
    if not all(id(m) in made for m in maps):
        return model  # a map is no module's output: what it depends on cannot be told
    # what starts after the last map was made cannot have fed any map
    needed = set(started[: max(made[id(m)][0] for m in maps)])
    tail = set(started) - needed
    shorter = copy.deepcopy(model)
    for name, module in model.named_modules():
        if module in tail:
            shorter.set_submodule(name, nn.Identity())
    try:
        return shorter if agree(maps, shorter(example)) else model
    except Exception:  # something wants a removed module's attribute
        return model


def followed(model, example, is_first, is_second):
    """Run `model` on `example` -> (its maps, {second: first}, {first: (H,W) of its input}).

    Of a pair of modules, the second receives the very tensor that the first returned.

    is_first, is_second: functions of a module. A module that runs twice may have a partner in one
    place only, so it is in no pair.
    """
    outputs, pairs, sizes, calls, hooks = {}, {}, {}, {}, []

    def after_first(module, inputs, out):
        calls[module] = calls.get(module, 0) + 1
        sizes[module] = inputs[0].shape[2:]
        outputs[id(out)] = module, out  # the tensor is kept, so that no other gets its id

    def before_second(module, inputs):
        calls[module] = calls.get(module, 0) + 1
        if id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][0]

    for module in model.modules():
        if is_first(module):
            hooks.append(module.register_forward_hook(after_first))
        elif is_second(module):
            hooks.append(module.register_forward_pre_hook(before_second))
    maps = model(example)
    for hook in hooks:
        hook.remove()
    once = {b: a for b, a in pairs.items() if calls[a] == calls[b] == 1}
    return maps, once, sizes


@torch.inference_mode()
def with_fused_norms(model, example):
    """Fold each batch norm that directly follows a convolution into that convolution.

    model: in evaluation mode; example: an input. Returns a changed copy, or `model` itself where
    the maps would differ. Of timm's BatchNormAct2d the activation stays.
    """
    fused = copy.deepcopy(model)
    is_norm = lambda module: isinstance(module, nn.BatchNorm2d)
    maps, pairs, _ = followed(fused, example, lambda m: isinstance(m, nn.Conv2d), is_norm)
    names = {module: name for name, module in fused.named_modules()}
    for norm, convolution in pairs.items():
        folded = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = folded.weight, folded.bias
        # dropout and activation of timm's norms take the norm's place
        rest = [getattr(norm, part, nn.Identity()) for part in ("drop", "act")]
        rest = [part for part in rest if not isinstance(part, nn.Identity)]
        fused.set_submodule(names[norm], rest[0] if len(rest) == 1 else nn.Sequential(*rest))
    return fused.requires_grad_(False) if agree(maps, fused(example)) else model


@torch.inference_mode()
def with_onednn(model, example):
    """Compute each convolution, with the activation that directly follows it, by oneDNN on a CPU.

    model: frozen; example: an input of the only size that the network will see. Returns a changed
    copy, or `model` itself where the maps would differ or oneDNN is missing. On one thread PyTorch
    computes 1x1 convolutions by copies and a product; each activation goes through memory again.
    """
    if not has_onednn():
        return model
    changed = copy.deepcopy(model)
    is_activation = lambda module: type(module) in POINTWISE
    maps, pairs, sizes = followed(changed, example, can_replace, is_activation)
    followers = {convolution: activation for activation, convolution in pairs.items()}
    names = {module: name for name, module in changed.named_modules()}
    for convolution, size in sizes.items():
        activation = followers.get(convolution, nn.Identity())
        if activation in names:
            changed.set_submodule(names[activation], nn.Identity())
        changed.set_submodule(names[convolution], OneDnnConvolution(convolution, activation, size))
    return changed.requires_grad_(False) if agree(maps, changed(example)) else model
