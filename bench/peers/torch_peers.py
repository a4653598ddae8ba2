"""What laprox computes, written in PyTorch as one would today, timed on the same GPU. Prints lines of JSON.

python3 bench/peers/torch_peers.py [--models a,b] [--tokens 8192,131072] [--runs 30] [--seconds 150]

Scores go layer by layer: a whole model's logits would not fit. Few layers are timed and scaled to all, which the lines say.
Compiled variants come last, largest sizes first, for as long as --seconds lasts.
"""

import argparse
import json
import statistics
import time

import torch

HEAD_DIM, ROWS, KEEP = 128, 32, 0.05
MODELS = {  # layers, query heads, KV heads, model width
    "Llama-3.1-8B": (32, 32, 8, 4096),
    "Llama-3.2-3B": (28, 24, 8, 3072),
    "Qwen2.5-7B": (28, 28, 4, 3584),
    "Llama-3.1-70B": (80, 64, 8, 8192),
}


def attention(q, k):
    """Softmax weights [G, R, m, n] of the last m queries [G, R, m, d] over the keys [G, n, d], in float32."""
    rows, tokens = q.shape[2], k.shape[1]
    logits = torch.matmul(q.flatten(1, 2), k.transpose(1, 2)).view(*q.shape[:3], tokens).float() * HEAD_DIM**-0.5
    row = torch.arange(tokens - rows, tokens, device=q.device)
    hidden = torch.arange(tokens, device=q.device)[None, :] > row[:, None]
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)


def joint_own(q, k, v, m):
    """Joint scores without the terms across heads: the R pairs (h, h) of m [G, R, R, d, d]."""
    a = attention(q, k)
    squares = a.square().sum(2)
    total = torch.zeros_like(squares[:, 0])
    for h in range(q.shape[1]):
        total = total + squares[:, h] * (torch.matmul(v, m[:, h, h]) * v).sum(-1).float()
    return total.clamp_min(0).sqrt()


def joint_all(q, k, v, m):
    """Joint scores: all R (R + 1) / 2 pairs."""
    a = attention(q, k)
    total = torch.zeros_like(a[:, 0, 0])
    for h in range(q.shape[1]):
        for other in range(h + 1):
            twice = 1 if other == h else 2
            total = total + twice * (a[:, h] * a[:, other]).sum(1) * (torch.matmul(v, m[:, h, other]) * v).sum(-1).float()
    return total.clamp_min(0).sqrt()


def snapkv(q, k, v, m):
    return attention(q, k).mean(2).mean(1)


def value_norms(q, k, v, m, w):
    """||v W_h||_1 of every query head, W_h [H, d, D]: a head at a time, as CriticalKV's public code does."""
    group = q.shape[1]
    return torch.stack([torch.matmul(v[h // group], w[h]).abs().sum(-1) for h in range(w.shape[0])])


class Timer:
    def __init__(self, runs):
        self.runs = runs
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def once(self, work):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.fill_(1)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def __call__(self, work):
        torch.cuda.synchronize()
        time.sleep(0.5)  # as bench/native/gpu_timing.cuh lets the card rest
        self.once(work)
        slow = self.once(work)
        runs = self.runs if slow < 20e3 else max(3, self.runs // 3) if slow < 100e3 else 3
        times = sorted(self.once(work) for _ in range(runs))
        at = lambda q: times[round(q * (len(times) - 1))]
        return {"medianUs": statistics.median(times), "p10Us": at(0.1), "p90Us": at(0.9), "runs": runs}


def line(kind, **fields):
    print(json.dumps({"kind": kind, **fields}), flush=True)


class Cache:
    """Some layers of a model: random, since dense PyTorch takes as long on any input."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
        self.layers, heads, self.kv_heads, width = MODELS[model]
        self.group = heads // self.kv_heads
        self.measured = min(self.layers, 4 if tokens > 32768 else 8)
        rand = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        self.k = [rand(self.kv_heads, tokens, HEAD_DIM) for _ in range(self.measured)]
        self.v = [rand(self.kv_heads, tokens, HEAD_DIM) for _ in range(self.measured)]
        self.q = [rand(self.kv_heads, self.group, ROWS, HEAD_DIM) for _ in range(self.measured)]
        self.w = rand(heads, HEAD_DIM, width) * width**-0.5
        stacked = self.w.view(self.kv_heads, self.group, HEAD_DIM, width).float()
        self.m = torch.einsum("grdx,gsex->grsde", stacked, stacked).bfloat16()

    def report(self, timing, scale, **fields):
        scaled = {key: value * scale if key.endswith("Us") else value for key, value in timing.items()}
        line("peer", model=self.model, layers=self.layers, measuredLayers=round(self.layers / scale), n=self.tokens, **fields, **scaled)

    def scores(self, timer, peer, stage, variant, function):
        def work():
            for q, k, v in zip(self.q, self.k, self.v):
                function(q, k, v, self.m)

        self.report(timer(work), self.layers / self.measured, peer=peer, stage=stage, variant=variant)

    def values(self, timer):
        def work():
            value_norms(self.q[0], self.k[0], self.v[0], self.m, self.w)

        self.report(timer(work), self.layers, peer="torch-eager", stage="value-statistic", variant="||v W_h||_1 of every query head")

    def choice(self, timer):
        scores = torch.rand(self.layers * self.kv_heads * self.tokens, device="cuda")
        kept = int(KEEP * scores.numel())
        fields = {"peer": "torch-eager", "stage": "select", "keep": KEEP}
        self.report(timer(lambda: torch.topk(scores, kept, sorted=False)), 1, variant="torch.topk, not pooled", **fields)
        self.report(timer(lambda: torch.sort(scores)), 1, variant="torch.sort, not pooled", **fields)

    def gather(self, timer):
        kept = int(KEEP * self.tokens)
        rows = [torch.rand(self.kv_heads, self.tokens, device="cuda").topk(kept).indices.sort(-1).values for _ in range(self.measured)]
        rows = [at[:, :, None].expand(-1, -1, HEAD_DIM) for at in rows]

        def work():
            for k, v, at in zip(self.k, self.v, rows):
                k.gather(1, at)
                v.gather(1, at)

        fields = {"peer": "torch-eager", "stage": "compact", "variant": "gather, as many of each head", "keep": KEEP}
        self.report(timer(work), self.layers / self.measured, **fields)


SCORES = [
    ("score-joint", "own pairs only", joint_own),
    ("score-snapkv", "", snapkv),
    ("score-joint", "all pairs", joint_all),
]


def machine(timer):
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = timer(lambda: torch.matmul(a, b))
    line(
        "peer-machine",
        torch=torch.__version__,
        gpu=torch.cuda.get_device_name(),
        matrixOperationsPerSecond=2 * 8192**3 / product["medianUs"] * 1e6,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=150)
    options = parser.parse_args()
    begin = time.monotonic()
    left = lambda: options.seconds - (time.monotonic() - begin)
    if not torch.cuda.is_available():
        line("skip", reason="PyTorch sees no GPU")
        return
    timer = Timer(options.runs)
    models = options.models.split(",")
    sizes = sorted((int(n) for n in options.tokens.split(",")), reverse=True)
    with torch.inference_mode():
        machine(timer)
        for model in models:
            for tokens in sizes:
                if left() < 0:
                    break
                cache = Cache(model, tokens)
                for stage, variant, function in SCORES:
                    cache.scores(timer, "torch-eager", stage, variant, function)
                cache.choice(timer)
                cache.gather(timer)
                if model == models[0]:
                    cache.values(timer)
                del cache
                torch.cuda.empty_cache()
        for tokens in sizes:
            cache = Cache(models[0], tokens)
            for stage, variant, function in SCORES:
                if left() < 12:
                    line("note", text=f"no time was left to compile {stage} {variant} for {tokens} tokens")
                    continue
                cache.scores(timer, "torch-compiled", stage, variant, torch.compile(function, dynamic=False))
            del cache
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
