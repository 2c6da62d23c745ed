"""A pretend card: tensors of the CPU that say they lie on another device, PyTorch's spare one.

They will not meet tensors that do not, and what a real card would have to wait for is counted. Nothing of PyTorch is
changed outside of a `with Card():`."""
from collections import Counter
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

CARD = torch.device('privateuseone')
# Where PyTorch looks for what a device can do.
ABLE = SimpleNamespace(get_amp_supported_dtype=lambda: [], manual_seed_all=lambda seed: None, _is_in_bad_fork=lambda: False)
# Operations whose result, or its size, the host must know: it waits until the card has come so far.
WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'equal',
         'is_nonzero', 'allclose', '_linalg_check_errors', 'item'}


class CardTensor(torch.Tensor):
    "A tensor on the card. Its numbers lie in the memory of the CPU."
    __torch_function__ = torch._C._disabled_torch_function_impl
    seen = Counter()   # what happened since it was cleared: 'waits', 'down', 'up', and the names of operations

    @property
    def device(self): return CARD

    def __reduce_ex__(self, protocol): return plain(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), choices=None):
        choices = choices or {}
        tensors = [leaf for leaf in tree_leaves((arguments, choices)) if isinstance(leaf, torch.Tensor)]
        strangers = [tensor for tensor in tensors if not isinstance(tensor, CardTensor) and tensor.dim() > 0]
        name = function.overloadpacket.__name__
        if strangers and name != 'copy_': raise RuntimeError(f'{name} was given tensors on card and CPU; allowed: on one device')
        cls.count(name, arguments, strangers)

        if torch.Tag.inplace_view in function.tags:   # squeeze_ and the like: of the tensor itself, not its numbers
            with no_dispatch(): function(*arguments, **choices)
            return arguments[0]

        owners = {}
        def bare(tensor):
            inside = plain(tensor)
            owners[id(inside)] = tensor
            return inside
        inner = tree_map_only(CardTensor, bare, (list(arguments), choices))
        with no_dispatch(): made = function(*inner[0], **inner[1])
        def owned(tensor): return owners[id(tensor)] if id(tensor) in owners else on_card(tensor)
        if strangers and not isinstance(arguments[0], CardTensor): return made   # copied down
        return tree_map_only(torch.Tensor, owned, made)

    @classmethod
    def count(cls, name, arguments, strangers):
        cls.seen[name] += 1
        masked = name in ('index', 'index_put', 'index_put_') and any(
            leaf is not None and leaf.dtype in (torch.bool, torch.uint8) for leaf in arguments[1])
        if name in WAITS or masked: cls.seen['waits'] += 1
        if strangers: cls.seen['up' if isinstance(arguments[0], CardTensor) else 'down'] += 1


def plain(tensor):
    "The numbers of a tensor on the card, as a tensor of the CPU over the same memory."
    with no_dispatch(): return torch.Tensor._make_subclass(torch.Tensor, tensor.detach())


def on_card(tensor):
    if isinstance(tensor, CardTensor): return tensor
    return torch.Tensor._make_subclass(CardTensor, tensor.detach())


def is_card(device): return device is not None and torch.device(device).type == CARD.type


TARGETS = {torch.Tensor.cpu: torch.device('cpu')}
READ = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class Card(TorchFunctionMode):
    "Inside the `with`, `CARD` is a device: where tensors are made, in `to` and `cpu`, and for modules."
    def __enter__(self):
        CardTensor.seen.clear()
        setattr(torch, CARD.type, ABLE)
        self.overwrote = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        delattr(torch, CARD.type)
        torch.__future__.set_overwrite_module_params_on_conversion(self.overwrote)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, arguments=(), choices=None):
        choices = dict(choices or {})
        if function is torch.Tensor.to or function in TARGETS: return self.move(function, arguments, choices)
        if function in READ and isinstance(arguments[0], CardTensor):
            CardTensor.seen['waits'] += 1
            return function(plain(arguments[0]), *arguments[1:], **choices)
        if function is torch.Tensor.new_tensor and isinstance(arguments[0], CardTensor):
            CardTensor.seen['up'] += 1
            return on_card(function(plain(arguments[0]), *arguments[1:], **choices))
        if not is_card(choices.get('device')): return function(*arguments, **choices)
        choices.pop('device')
        made = function(*arguments, **choices)
        if function in (torch.tensor, torch.as_tensor, torch.asarray): CardTensor.seen['up'] += 1
        requires_grad = made.requires_grad
        return on_card(made).requires_grad_(requires_grad)

    def move(self, function, arguments, choices):
        tensor, *rest = arguments
        there = isinstance(tensor, CardTensor)
        target, dtype = self.target(function, rest, choices)
        goes_up = is_card(target) and not there
        goes_down = there and target is not None and not is_card(target)
        if not goes_up and not goes_down:
            if dtype is None: return tensor
            return tensor.type(dtype) if there else function(*arguments, **choices)
        CardTensor.seen['up' if goes_up else 'down'] += 1
        moved = tensor.detach() if goes_up else plain(tensor)
        moved = moved.to(dtype) if dtype else moved.clone()
        return on_card(moved) if goes_up else moved

    def target(self, function, rest, choices):
        "The device and the dtype that are asked for, None where none is."
        if function in TARGETS: return TARGETS[function], None
        other = choices.get('other', rest[0] if rest else None)
        if isinstance(other, torch.Tensor): return other.device, other.dtype
        device, dtype, _, _ = torch._C._nn._parse_to(*rest, **choices)
        return device, dtype
