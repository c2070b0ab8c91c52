"""Thing 2: what fine-tuning trains (section 4, Figure 4), and how it starts from a pretrained backbone (the trunk).

strategy   trains
full       everything
attn       qkv and proj of every branch's attention, head, position embedding
ffn        fc1 and fc2 of every branch's feed-forward network, head, position embedding
head       head, position embedding
fc1        the first matrix of every feed-forward network with its bias, head, position embedding
norm       every norm, head, position embedding
bias       every bias, head, position embedding
last-k     the last k layers, whole, head, position embedding

The last four are not the paper's: what else is enough shows whether attention is special. Paper: "MHSA weights", with
padlocks on FFN, LayerNorms and patch projection in Figure 4. Released code: main.py --attn-only keeps every name that
contains `.attn.`, then head and pos_embed; the second branch of its parallel blocks is called `attn1`, so that it trains
half of their attention. Here a module's role counts, not its name, in our models, in timm's and in Hugging Face's; a
model with attention of a class that is not known is refused, not trained in part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vitlib.data import DataSet
from vitlib.errors import UsageError, unknown
from vitlib.model import ViT, ViTConfig, resize_positions, set_execution
from vitlib.model.layers import FFN, MHSA
from vitlib.model.vit import RelativeBias
from vitlib.model.weights import differences
from vitlib.train import supervised
from vitlib.train.protocol import LossFunction, Protocol, State


@dataclass(frozen=True)
class Role:
    """The kind of layer that a strategy trains: its known classes, and the words in a name that make others suspect."""

    classes: tuple[type, ...]
    words: tuple[str, ...]
    ending: str  # of Hugging Face's classes: ViTAttention

    def is_of(self, module: nn.Module) -> bool:
        kind = type(module)  # by its name, since transformers may not be installed
        theirs = kind.__module__.startswith("transformers.") and kind.__name__.endswith(self.ending)
        return theirs or isinstance(module, self.classes)

    def suspects(self, name: str, module: nn.Module) -> bool:
        """Whether `module` looks like this role by its name or class, and is no mere container of known layers."""
        text = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        # a list `attns`, or an AttentionBlock with norms beside its attention, is read by what it holds
        holds_known = any(map(self.is_of, module.modules()))
        is_list = isinstance(module, CONTAINERS) or text.endswith(("block", "layer"))
        return any(word in text for word in self.words) and not (is_list and holds_known)


ROLES = {  # strategy -> what it trains beside head and positions
    "attn": Role((MHSA, Attention), ("attn", "attention"), "Attention"),
    "ffn": Role((FFN, Mlp), ("mlp", "ffn", "feedforward"), "MLP"),
}
PAPER_STRATEGIES = ("full", *ROLES, "head")  # the columns of Tables 5 and 6, and the head alone
STRATEGIES = (*PAPER_STRATEGIES, "fc1", "norm", "bias")
LAST = re.compile(r"last-([1-9]\d{0,3})")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# timm's names: `embeds.pos_embed` of naflexvit, `pos_embed_0` of crossvit, `relative_position_bias_table` of Swin
POSITIONS = re.compile(r"(^|\.)(pos_embed|position_embed|rel_pos|relative_position)")
BIAS = re.compile(r"(^|[._])bias$")  # `q_bias` of BEiT too
HEADS = ("head", "head_dist", "fc", "classifier")  # distilled DeiT's is the second, Hugging Face's the last
WRAPPERS = (DataParallel, DistributedDataParallel)


def trainable(model: nn.Module, strategy: str) -> list[str]:
    """The exact names of the parameters that a strategy trains, in the model's order.

    Raises UsageError for an unknown strategy, a model without a head, layers of the strategy's role in a class that is not
    known, because they would stay frozen without a word, and quantized layers, which no optimizer trains.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} has no parameters to train: allowed is a model (torch.nn.Module)")
    last = LAST.fullmatch(str(strategy))
    if strategy not in STRATEGIES and not last:
        raise unknown("strategy", strategy, (*STRATEGIES, "last-1, last-2, ..."))
    named, kind = dict(model.named_parameters()), type(unwrapped(model)).__name__
    if strategy == "full":
        return trained(named, ids([model]))
    # head and positions: timm's tables by their names, ours of relative positions by its class
    kept = ids(heads(model, needed=strategy == "head"))
    kept |= {id(p) for name, p in named.items() if POSITIONS.search(name)}
    kept |= ids(m for m in model.modules() if isinstance(m, RelativeBias))
    # what the strategy is named after
    if strategy in ("attn", "ffn", "fc1"):
        kept |= of_role(model, strategy, kept)
    elif last:
        kept |= ids(last_layers(unwrapped(model), int(last[1])))
    elif strategy in ("norm", "bias"):
        biases = ids([model]) & {id(p) for name, p in named.items() if BIAS.search(name)}
        if not (there := norms(model) if strategy == "norm" else biases):
            raise UsageError(f"{kind} has no {strategy} parameters that could be trained")
        kept |= there
    return trained(named, kept)


def trained(named: Mapping[str, nn.Parameter], kept: set[int]) -> list[str]:
    """The names of those that are kept. Raises UsageError for integers, e.g. quantized weights, which have no gradient."""
    names = [name for name, p in named.items() if id(p) in kept]
    if whole := [name for name in names if not (named[name].is_floating_point() or named[name].is_complex())]:
        raise UsageError(f"{whole[0]} is {str(named[whole[0]].dtype).removeprefix('torch.')}, which cannot be trained")
    return names


def ids(modules: Iterable[nn.Module]) -> set[int]:
    """Their parameters, told apart by identity, because torch.compile and DataParallel change their names.

    Raises UsageError where torch has packed weights, which are no parameters then.
    """
    modules = list(modules)
    if packed := next((m for module in modules for m in module.modules() if hasattr(m, "_packed_params")), None):
        kind = f"{type(packed).__module__}.{type(packed).__qualname__}"
        raise UsageError(f"a quantized layer ({kind}) cannot be trained: freeze the model before it is quantized")
    return {id(p) for module in modules for p in module.parameters()}


def last_layers(model: nn.Module, k: int) -> nn.Module:
    """The last k layers. Raises UsageError where there are fewer, or more in another list, as in CaiT."""
    lists = {
        name: child for name, child in model.named_children()
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and (name == "layers" or "block" in name)
    }  # fmt: skip
    layers = lists.get("layers", lists.get("blocks", ()))  # ours or timm's
    if len(lists) > 1 or len(layers) < k:
        there = " and ".join(f"{len(child)} in {name}" for name, child in lists.items()) or "none"
        allowed = f"models of {k} layers and more: this {type(model).__name__} has {there}; known is one list, layers or blocks"
        raise UsageError(f"strategy 'last-{k}' is for {allowed}")
    return layers[-k:]


def of_role(model: nn.Module, strategy: str, kept: set[int]) -> set[int]:
    """Attention or feed-forward networks of every branch: all of their parameters, for fc1 those of their first matrix."""
    role, kind = ROLES["ffn" if strategy == "fc1" else strategy], type(unwrapped(model)).__name__
    known = " and ".join(f"{c.__module__.split('.')[0]}'s {c.__name__}" for c in role.classes)
    known += f" and those of transformers that end in {role.ending}"
    layers = list(filter(role.is_of, model.modules()))
    if not layers:
        raise UsageError(f"{kind} has no {strategy} layers that can be told apart: known are {known}")
    # what cannot be told apart is refused; norms do not count
    seen = kept | ids(layers) | norms(model)
    for name, module in unwrapped(model).named_modules():
        if name and role.suspects(name, module) and not ids([module]) <= seen:
            unseen = f"{name} ({type(module).__name__})"
            raise UsageError(f"{kind}'s {unseen} would stay frozen with strategy {strategy!r}: known are {known}")
    if strategy == "fc1" and (other := next((m for m in layers if not hasattr(m, "fc1")), None)):
        raise UsageError(f"{kind} has a {type(other).__name__} without fc1: allowed are those that have one")
    return ids(layer.fc1 for layer in layers) if strategy == "fc1" else ids(layers)


def norms(model: nn.Module) -> set[int]:
    """The parameters of every norm, told by the name of its class."""
    found = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return {id(p) for m in found for p in m.parameters(recurse=False)}


def heads(model: nn.Module, needed: bool) -> list[nn.Module]:
    """The classifiers of a model: several in distilled ones. needed: they must have parameters."""
    model = unwrapped(model)
    # timm's own answer (a tuple for distilled models), then attributes with the names of heads
    given = model.get_classifier() if hasattr(model, "get_classifier") else ()
    found = [*(given if isinstance(given, tuple) else (given,)), *(getattr(model, name, None) for name in HEADS)]
    found = [module for module in found if isinstance(module, nn.Module)]
    if not found or (needed and not any(True for module in found for _ in module.parameters())):
        raise UsageError(f"{type(model).__name__} has no head that could be trained: known are {', '.join(HEADS)}")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DataParallel."""
    while inner := getattr(model, "_orig_mod", None) or (isinstance(model, WRAPPERS) and model.module):
        model = inner
    return model


def freeze(model: nn.Module, strategy: str) -> list[str]:
    """Set `requires_grad` as the strategy says; returns the names that train. Raises UsageError as `trainable`."""
    # DDP waits for the gradients of what trained when it was made
    if isinstance(model, nn.Module) and any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise UsageError("freeze the model before DistributedDataParallel wraps it: model.module is what it wraps")
    kept = trainable(model, strategy)
    chosen = set(kept)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in chosen
    return kept


def start_from(weights: Mapping[str, Tensor], config: ViTConfig, seed: int = 0, new_head: bool = False) -> ViT:
    """A model of `config` with the weights of a pretrained backbone.

    The backbone may be a classifier at another image size or with other classes, or a masked pre-trained model without
    a head. new_head: the head is fresh though its shape is the same, because the backbone's classes were others.
    Raises UsageError with the list of keys if anything else differs; nothing is loaded loosely.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        kind = type(weights).__name__
        raise UsageError(f"a trunk's weights are tensors by name, as state_dict() gives them, and no {kind}")
    model = ViT(config, seed)
    fresh, weights = model.state_dict(), dict(weights)
    # positions: (1, n * n, D) -> (1, grid * grid, D)
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_positions(weights["pos_embed"], config.grid)
    # a fresh head where the classes are others; a model without classes has none
    head = {name: tensor for name, tensor in fresh.items() if name.startswith("head.")}
    if new_head or any(name not in weights or weights[name].shape != tensor.shape for name, tensor in head.items()):
        weights |= head
    # every other tensor has the same name and shape
    if differ := differences(fresh, weights):
        raise UsageError(f"the trunk does not fit {config.name}: {differ}; nothing was loaded")
    model.load_state_dict(weights)
    return model


def at_image_size(config: ViTConfig, image_size: int) -> ViTConfig:
    """The same model for another resolution. Raises UsageError for a size that the patch does not divide."""
    return replace(config, image_size=image_size)


def start(spec: Any, data: DataSet, weights: State, *_: object) -> tuple[ViT, LossFunction]:
    """The backbone's weights with the strategy's parameters trainable, and the supervised loss of the recipe."""
    known_classes = spec.parent is not None and spec.parent.data == spec.data
    model = start_from(weights, spec.model, spec.seed, new_head=not known_classes)
    freeze(model, spec.strategy)
    return set_execution(model, spec.execution), supervised.loss_of(spec.recipe)


PROTOCOL = Protocol("finetune", start, supervised.evaluate, needs_parent=True)
