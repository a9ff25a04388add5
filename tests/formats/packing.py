"""Float models, packed ones, and the floats that those stand for."""

import copy
from collections import Counter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import Scheme, parse_scheme
from qwlora.nn import is_packable, pack_module, tie_weights_, weight_out_in
from qwlora.nn.packed_layer import pack_parameter_, parameter_out_in
from qwlora.nn.packed_tensor import PackedTensor


def quantized(weight: Tensor, scheme: Scheme | str) -> QuantizedTensor:
    """Codes of the min-max grid."""
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    weight = weight.detach().float()
    encoding = measure(weight, scheme)
    return QuantizedTensor(encoding.quantize(weight), encoding)


def packed_and_twin(model: nn.Module, scheme: Scheme | str) -> tuple[nn.Module, nn.Module]:
    """The packed model, and a float model with exactly the dequantized values."""
    twin = copy.deepcopy(model)
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for path, module in list(model.named_modules()):
        if path.endswith("lm_head") and uses[id(module.weight)] > 1:
            continue
        if is_packable(module):
            found = quantized(weight_out_in(module), scheme)
            model.set_submodule(path, pack_module(module, found))
            weight, values = twin.get_submodule(path).weight, found.dequantize()
            weight.data = values.T if isinstance(module, Conv1D) else values.view(weight.shape)
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim == 3:
                found = quantized(parameter_out_in(module, name), scheme)
                packed = pack_parameter_(module, name, PackedTensor.from_quantized(found))
                values = found.dequantize()
                values = values.mT.contiguous() if packed.transposed else values
                twin.get_submodule(path)._parameters[name].data = values
    if hasattr(model, "tie_weights"):
        tie_weights_(model)
    return model, twin
