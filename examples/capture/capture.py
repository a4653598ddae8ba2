#!/usr/bin/env python3
"""Writes what a Hugging Face model has in its KV cache after a prompt: a capture, which `laprox evict` and `laprox compare` read.

    pip install torch "transformers>=4.53"
    python capture.py --model Qwen/Qwen3-0.6B --text prompt.txt --out prompt.safetensors
    python capture.py --random --out random.safetensors     # a small Llama with random weights, which downloads nothing

The whole text is read in one pass. Its last tokens (--later) count as what comes after the prompt: their queries are there to judge an
eviction by, and their keys are not in the capture. docs/captures.md has the format.

Any model whose attention goes through transformers' attention interface will do, with grouped heads, soft-caps, sliding windows and
sinks; each layer's attention is computed again from what was captured, and the script fails where the model computed something else.
"""

import argparse
import json
import math
import sys

import torch
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, __version__
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

NAME = "laprox_capture"
# Names that models give to the output projection of their attention.
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# How far a layer's attention may be from the one computed here, relative to its norm: bfloat16 is off by less than 1 %.
TOLERANCE = 0.05


class Recorder:
    """An attention function that keeps what it sees of a text of `tokens` and some later tokens, and leaves the work to `inner`."""

    def __init__(self, inner, tokens, window):
        self.inner = inner
        self.tokens = tokens
        self.window = window
        self.tensors = {}
        self.scale = {}
        self.soft_cap = {}
        self.sliding_window = {}

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        # query [1, queryHeads, tokens + later, headDim], rotated; key and value [1, kvHeads, tokens + later, headDim]
        result = self.inner(module, query, key, value, attention_mask, **kwargs)
        layer = module.layer_idx
        if key.shape != value.shape or query.shape[2] != key.shape[2]:
            sys.exit(f"layer {layer}: queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)} do not fit a capture")
        scaling = kwargs.get("scaling")
        self.scale[layer] = 1 / math.sqrt(query.shape[3]) if scaling is None else float(scaling)
        self.soft_cap[layer] = float(kwargs.get("softcap") or 0)
        self.sliding_window[layer] = int(kwargs.get("sliding_window") or 0)
        sinks = kwargs.get("s_aux")
        tensors = {
            "keys": key[0, :, : self.tokens],
            "values": value[0, :, : self.tokens],
            "queries": query[0, :, max(0, self.tokens - self.window) : self.tokens],
            "output_projection": output_projection(module, query.shape[1] * query.shape[3]),
        }
        if query.shape[2] > self.tokens:
            tensors["later_queries"] = query[0, :, self.tokens :]
        if sinks is not None:
            tensors["sink_logits"] = sinks.detach().float().flatten()
        self.check(layer, tensors, result[0][0, self.tokens - 1])
        for name, tensor in tensors.items():
            self.tensors[f"layers.{layer}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
        return result

    def check(self, layer, tensors, expected):
        """Compares the attention of the last token of the prompt, computed from what was recorded, with the model's [queryHeads, headDim]."""
        query = tensors["queries"][:, -1].float()
        keys, values = tensors["keys"].float(), tensors["values"].float()
        group = query.shape[0] // keys.shape[0]
        logits = torch.einsum("gnd,grd->grn", keys, query.unflatten(0, (keys.shape[0], group))) * self.scale[layer]
        if self.soft_cap[layer] > 0:
            logits = self.soft_cap[layer] * torch.tanh(logits / self.soft_cap[layer])
        if self.sliding_window[layer] > 0:
            logits[..., : max(0, self.tokens - self.sliding_window[layer])] = -math.inf
        if "sink_logits" in tensors:
            logits = torch.cat([logits, tensors["sink_logits"].to(logits.device).view(keys.shape[0], group, 1)], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : self.tokens]
        found = torch.einsum("grn,gnd->grd", weights, values).flatten(0, 1)
        error = float((found - expected.float()).norm() / expected.float().norm())
        if not error <= TOLERANCE:
            sys.exit(f"layer {layer}: its attention is not what laprox takes it for (off by {100 * error:.1f} %), so that a capture would be wrong")

    def metadata(self):
        """What the model does to its logits: a number, or one per layer; nothing where nothing is done."""
        metadata = {}
        for name, values in (("scale", self.scale), ("soft_cap", self.soft_cap), ("sliding_window", self.sliding_window)):
            numbers = [values[layer] for layer in sorted(values)]
            if any(numbers):
                metadata[name] = json.dumps(numbers[0] if len(set(numbers)) == 1 else numbers)
        return metadata


def output_projection(module, features):
    """The weight [D, queryHeads * headDim] of an attention's output projection."""
    for name in PROJECTIONS:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if weight is None:
            continue
        # GPT-2's Conv1D has it the other way round.
        if type(projection).__name__ == "Conv1D":
            weight = weight.t()
        if weight.is_floating_point() and weight.dim() == 2 and weight.shape[1] == features:
            return weight
        sys.exit(f"{name} is {weight.dtype} {list(weight.shape)}; expected floats [D, {features}]: quantized weights are not captured")
    sys.exit(f"{type(module).__name__} has no output projection among {', '.join(PROJECTIONS)}")


def load(options):
    """The model, the ids [1, tokens + later] and the text of each token."""
    if options.random:
        torch.manual_seed(0)
        length = (options.tokens or 512) + options.later
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=length,
            # Large enough that attention is not the same everywhere.
            initializer_range=0.2,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
        ids = torch.randint(256, (1, length))
        return model, ids, [f"<{i}>" for i in ids[0].tolist()]
    # The option's old name goes away some day, and its new one was not there at first.
    dtype = "dtype" if tuple(int(part) for part in __version__.split(".")[:2]) >= (4, 56) else "torch_dtype"
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=NAME, **{dtype: options.dtype})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids
    if options.tokens:
        ids = ids[:, : options.tokens + options.later]
    return model, ids, [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids[0].tolist()]


def capture(options):
    """Reads the text with the model; gives the capture's tensors and metadata."""
    # The recorder is made below, when it is known how many tokens there are.
    recorder = None
    AttentionInterface.register(NAME, lambda *args, **kwargs: recorder(*args, **kwargs))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model, ids, texts = load(options)
    tokens = ids.shape[1] - options.later
    if tokens < 1:
        sys.exit(f"the text has {ids.shape[1]} tokens; expected more than --later {options.later}")
    inner = sdpa_attention_forward
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(module, "sinks") for module in model.modules()):
        # What SDPA cannot do; the model's own function takes memory for every pair of tokens.
        AttentionMaskInterface.register(NAME, eager_mask)
        inner = eager_attention(model)
    recorder = Recorder(inner, tokens, options.window)
    model = model.to(options.device).eval()
    with torch.inference_mode():
        # Without the head: nobody needs the logits. Without a cache: attention sees all keys, those outside a sliding window too.
        model.base_model(input_ids=ids.to(options.device), use_cache=False)
    name = "random Llama" if options.random else options.model
    metadata = {"laprox.capture": "1", "model": name, "tokens": json.dumps(texts[:tokens]), **recorder.metadata()}
    return recorder.tensors, metadata


def eager_attention(model):
    """The plain attention function of the model's own module."""
    for module in model.modules():
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is not None and hasattr(module, "layer_idx"):
            return function
    sys.exit(f"{type(model).__name__} has soft-caps or sinks, but no eager_attention_forward")


def between(least, most):
    def parse(text):
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{number} is not between {least} and {most}")
        return number

    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a name on the Hugging Face hub, or a folder")
    source.add_argument("--random", action="store_true", help="a small Llama with random weights instead")
    parser.add_argument("--text", help="a file with the prompt and what comes after it")
    parser.add_argument("--out", required=True, help="the capture, a safetensors file")
    parser.add_argument("--tokens", type=between(1, 2**31), help="tokens of the prompt (all of the text but --later; 512 with --random)")
    parser.add_argument("--later", type=between(0, 128), default=32, help="tokens after the prompt (%(default)s)")
    parser.add_argument("--window", type=between(1, 128), default=128, help="last queries of the prompt (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, and so of the cache (%(default)s); float32 with --random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    options = parser.parse_args()
    if options.model and not options.text:
        parser.error("--model needs a --text")
    tensors, metadata = capture(options)
    save_file(tensors, options.out, metadata=metadata)
    layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    keys = tensors["layers.0.keys"]
    print(f"{options.out}: {layers} layers, {keys.shape[0]} KV heads of {keys.shape[2]}, {keys.shape[1]} tokens, {str(keys.dtype).split('.')[-1]}")


if __name__ == "__main__":
    main()
