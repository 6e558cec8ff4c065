#!/usr/bin/env python3
"""What others need for a LoRA layer on this machine: PyTorch, torch.compile, PEFT, and whatever other LoRA kernels are installed.

    python3 benches/peers/peers.py --json benches/results/<gpu>-<date>-<commit>-peers.json [--shapes lorafusion] [--dropout 0]
    python3 benches/peers/peers.py --dram --json ..    bytes read from and written to memory, counted by ncu, instead of times
    python3 benches/peers/peers.py --list              who would run here, and why the others do not

Needs torch; on a machine without a GPU it times tiny layers on the CPU, which only shows that it works. Ways of a shape take turns,
round after round, over buffers that together exceed L2 twice, after a warm-up of a fifth of the time; a figure is the median of its
rounds, a tax the median of the ratios to the plain products of the same round. Before anybody is timed its results are held
against the same layer in f32; who is further off than 2 % is not timed, and the reason is printed.

The JSON has the fields of benches/results/README.md. `step` is forward and backward with the gradients of x, A and B; its plain
products are x·Wᵀ and dy·W.
"""
import argparse
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import dram

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("peers: this needs torch (python3 -m pip install torch)")

SCALE = 2.0
LLAMA = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (8192, 8192))
SHAPES = {  # (M, N, K, ranks, dropout)
    "llama": [(m, n, k, (16, 64, 128), 0.0) for m in (8192, 2048, 512) for n, k in LLAMA],
    "decode": [(m, 4096, 4096, (16,), 0.0) for m in (1, 4, 16, 64, 256)],
    # The grid that LoRAFusion publishes.
    "lorafusion": [(m, d, d, (16,), 0.1) for d in (4096, 5120, 8192) for m in range(2048, 8193, 1024)],
    # Where it publishes bytes of memory.
    "traffic": [(8192, d, d, (16,), 0.1) for d in (4096, 5120, 8192)],
    "tiny": [(64, 96, 128, (4,), 0.0), (64, 96, 128, (4,), 0.1)],
}


class Layer:
    """One layer with as many sets of activations and weights as overflow L2."""

    def __init__(self, m, n, k, r, dropout, device, dtype):
        self.m, self.n, self.k, self.r, self.dropout = m, n, k, r, dropout
        one = 2 * (2 * m * k + n * k + 2 * m * n)
        self.sets = 1 if device == "cpu" else max(2, min(16, 1 + 2 * l2_bytes() // one))
        draw = lambda rows, cols, size: (torch.randn(rows, cols, device=device) * size).to(dtype)
        self.x = [draw(m, k, 1.0).requires_grad_() for _ in range(self.sets)]
        self.w = [draw(n, k, k**-0.5) for _ in range(self.sets)]
        self.dy = [draw(m, n, 1.0) for _ in range(self.sets)]
        self.a = draw(r, k, k**-0.5).requires_grad_()
        self.b = draw(n, r, 0.02).requires_grad_()

    def flops(self, op):
        m, n, k, r = self.m, self.n, self.k, self.r
        forward = 2 * (m * n * k + m * r * (n + k))
        return forward if op == "forward" else forward + 2 * (m * n * k + 2 * m * r * (n + k))


def l2_bytes():
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)


def dropped(x, p):
    return F.dropout(x, p) if p else x


# A way takes a layer and gives f(x, w, a, b, set) -> y, or None where it does not apply to the layer. It raises ImportError when
# what it needs is not installed.


def torch_way(layer):
    """As PEFT writes it: four operations, each of which reads or writes M × N."""
    return lambda x, w, a, b, _: F.linear(x, w) + F.linear(F.linear(dropped(x, layer.dropout), a), b) * SCALE


def addmm_way(layer):
    """The best composition by hand: the last product adds to y."""
    return lambda x, w, a, b, _: torch.addmm(F.linear(x, w), F.linear(dropped(x, layer.dropout), a), b.t(), alpha=SCALE)


def compiled_way(layer):
    return torch.compile(torch_way(layer), dynamic=False)


def merged_way(layer):
    """W' = W + s·B·A made anew for each step, then one product: the cheapest of all, and it loses bits of the update."""
    if layer.dropout:
        return None
    return lambda x, w, a, b, _: F.linear(x, torch.addmm(w, b, a, alpha=SCALE))


def peft_way(layer):
    return peft_layers(layer, layer.a.dtype)


def peft_f32_way(layer):
    """PEFT's default over a 16-bit base."""
    return peft_layers(layer, torch.float32)


def peft_layers(layer, adapter_dtype):
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    modules = []
    for w in layer.w:
        base = torch.nn.Linear(layer.k, layer.n, bias=False, device="meta")
        base.weight = torch.nn.Parameter(w, requires_grad=False)
        options = dict(r=layer.r, lora_alpha=SCALE * layer.r, lora_dropout=layer.dropout)
        try:
            module = Linear(base, adapter_name="default", config=LoraConfig(**options), **options)
        except TypeError:  # before PEFT 0.19 there is no config
            module = Linear(base, adapter_name="default", **options)
        module.lora_A.default.weight = torch.nn.Parameter(layer.a.detach().to(adapter_dtype))
        module.lora_B.default.weight = torch.nn.Parameter(layer.b.detach().to(adapter_dtype))
        modules.append(module.train())
    forward = lambda x, w, a, b, at: modules[at](x)
    forward.parameters = lambda at: (modules[at].lora_A.default.weight, modules[at].lora_B.default.weight)
    return forward


def unsloth_way(layer):
    from unsloth.kernels.fast_lora import LoRA_W

    if layer.dropout:
        return None  # its fast path is without
    return lambda x, w, a, b, _: LoRA_W.apply(x.unsqueeze(0), w, None, a, b, SCALE).squeeze(0)


def lorafusion_way(layer):
    from lorafusion.ops.lora_v1 import fused_linear_lora

    seed = iter(range(1 << 30))
    return lambda x, w, a, b, _: fused_linear_lora(x.unsqueeze(0), w, a, b, SCALE, next(seed), layer.dropout).squeeze(0)


def vllm_way(layer):
    """Shrink and expand as vLLM serves one adapter; forward alone."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    if layer.dropout:
        return None
    device = layer.a.device
    meta = LoRAKernelMeta.make(1, layer.m, device=device)
    meta.prepare_tensors(torch.zeros(layer.m, dtype=torch.int32, device=device))
    middle = torch.zeros(1, layer.m, layer.r, dtype=torch.float32, device=device)

    def forward(x, w, a, b, _):
        y = F.linear(x, w)
        arguments = meta.meta_args(layer.m)
        middle.zero_()  # shrink adds its parts along K
        lora_shrink(x, [a.detach().unsqueeze(0)], middle, *arguments, SCALE)
        lora_expand(middle, [b.detach().unsqueeze(0)], y, *arguments, add_inputs=True)
        return y

    forward.without_gradients = True
    return forward


WAYS = {
    "torch": torch_way,
    "addmm": addmm_way,
    "compiled": compiled_way,
    "merged": merged_way,
    "peft": peft_way,
    "peft_f32": peft_f32_way,
    "unsloth": unsloth_way,
    "lorafusion": lorafusion_way,
    "vllm": vllm_way,
}
# Installed or not, they have no kernel for a LoRA layer.
WITHOUT = {"liger": "liger-kernel has no kernel of a LoRA layer"}


def make(name, layer):
    """(function, None), or (None, why there is none)."""
    try:
        function = WAYS[name](layer)
    except Exception as error:  # whatever a foreign package raises, the others go on
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return function, None if function else "does not apply"


def parameters(function, layer, at):
    return function.parameters(at) if hasattr(function, "parameters") else (layer.a, layer.b)


def step(function, layer, at):
    x, (a, b) = layer.x[at], parameters(function, layer, at)
    return torch.autograd.grad(function(x, layer.w[at], a, b, at), (x, a, b), layer.dy[at])


def wrong(function, layer):
    """Why the results of a way are not those of the layer; None when they are. With dropout only y's mean can be compared."""
    with torch.no_grad():
        y = function(layer.x[0], layer.w[0], layer.a, layer.b, 0).float()
    f32 = [t.detach().float().requires_grad_() for t in (layer.x[0], layer.a, layer.b)]
    x, a, b = f32
    truth = F.linear(x, layer.w[0].float()) + F.linear(F.linear(x, a), b) * SCALE
    pairs = [("y", y, truth)]
    if not layer.dropout and not hasattr(function, "without_gradients"):
        gradients = step(function, layer, 0)
        truths = torch.autograd.grad(truth, f32, layer.dy[0].float())
        pairs += list(zip(("dx", "da", "db"), gradients, truths))
    bound = 0.5 if layer.dropout else 0.02  # dropout: scaled noise on the narrow branch
    for name, got, want in pairs:
        error = ((got.float() - want).norm() / want.norm()).item()
        if not error <= bound:
            return f"{name} is off by {error:.3g} (Frobenius norm, allowed {bound})"
    return None


class Clock:
    """Microseconds of a call, averaged over some: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def __call__(self, function, calls):
        if not self.cuda:
            begin = time.perf_counter()
            for at in range(calls):
                function(at)
            return (time.perf_counter() - begin) * 1e6 / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # clocks: the host queues the calls meanwhile
        begin.record()
        for at in range(calls):
            function(at)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls


def measure(cases, clock, seconds):
    """{name: microseconds of each round}; every round times every case once."""
    calls, times = {}, {name: [] for name in cases}
    for name, function in cases.items():
        for at in range(3):  # compile, allocate, choose algorithms
            function(at)
        calls[name] = max(1, min(50, int(4000 / max(clock(function, 2), 1.0))))
    begin = time.monotonic()
    while time.monotonic() - begin < seconds or min(map(len, times.values())) < 5:
        warm = time.monotonic() - begin > seconds / 5
        for name, function in cases.items():
            took = clock(function, calls[name])
            if warm:
                times[name].append(took)
    return times


def calls_of(functions, layer):
    """{(op, way): function of a call's number}. The plain products are those of the way `plain`."""
    at = lambda index: index % layer.sets

    def no_grad(function):
        def call(index):
            with torch.no_grad():
                function(at(index))
        return call

    forward = lambda i: F.linear(layer.x[i], layer.w[i])
    cases = {
        ("forward", "plain"): no_grad(forward),
        ("step", "plain"): no_grad(lambda i: (forward(i), torch.mm(layer.dy[i], layer.w[i]))),
    }
    for name, function in functions.items():
        a_b = lambda i, function=function: parameters(function, layer, i)
        cases["forward", name] = no_grad(lambda i, f=function, p=a_b: f(layer.x[i], layer.w[i], *p(i), i))
        if not hasattr(function, "without_gradients"):
            cases["step", name] = lambda index, f=function: step(f, layer, at(index))
    return cases


def which(layer, op, way):
    """The fields that say what a row is of."""
    plain = way == "plain"
    return dict(op=op, way="torch_plain" if plain else way, dtype="bf16", m=layer.m, n=layer.n, k=layer.k,
                r=0 if plain else layer.r, dropout=0.0 if plain else layer.dropout)


def rows_of(layer, times):
    rows = []
    for (op, way), samples in times.items():
        ordered, plain = sorted(samples), times[op, "plain"]
        us = statistics.median(samples)
        is_plain = way == "plain"
        flops = (2 if op == "step" else 1) * 2 * layer.m * layer.n * layer.k if is_plain else layer.flops(op)
        ratio = statistics.median(mine / floor for mine, floor in zip(samples, plain))
        rows.append(which(layer, op, way) | dict(
            us=us, spread=(ordered[len(ordered) * 9 // 10] - ordered[len(ordered) // 10]) / us, samples=len(samples),
            tflops=flops / us / 1e6, tax_percent=None if is_plain else 100 * (ratio - 1),
            tax_over=None if is_plain else "torch_plain",
        ))
    return rows


def ready(layer, names):
    """{name: function} of the ways that compute the layer; prints why the others do not."""
    functions = {}
    for name in names:
        function, reason = make(name, layer)
        if function is not None:
            try:
                reason = wrong(function, layer)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is None:
            functions[name] = function
        else:
            print(f"  {name:<11} not run: {reason}")
    return functions


def dram_row(arguments, layer, op, way):
    """Bytes of one call, by ncu over a run of this script that does nothing else; None, with the reason printed, when it fails."""
    one = [sys.executable, __file__, "--once", op, way, *map(str, (layer.m, layer.n, layer.k, layer.r, layer.dropout))]
    done = subprocess.run(["ncu", "--profile-from-start", "off", "--csv", "--page", "raw", "--print-units", "base",
                           "--metrics", ",".join(dram.METRICS.values()), *one], capture_output=True, text=True)
    try:
        counted = dram.kernels(done.stdout)
        if done.returncode:
            raise dram.Unreadable((done.stderr or done.stdout).strip()[-200:])
    except dram.Unreadable as error:
        print(f"  {way:<11} {op}: exit {done.returncode} of ncu: {error}")
        return None
    return which(layer, op, way) | dram.counts(counted)


def once(arguments):
    """The child of `dram_row`: warms up, then makes one call between the profiler's marks."""
    op, way = arguments.once[:2]
    m, n, k, r = map(int, arguments.once[2:6])
    layer = Layer(m, n, k, r, float(arguments.once[6]), "cuda", torch.bfloat16)
    functions = {} if way == "plain" else {way: make(way, layer)[0]}
    call = calls_of(functions, layer)[op, way]
    for index in range(3):
        call(index)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(3)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def machine(device, command):
    def said(*words):
        try:
            return subprocess.run(words, capture_output=True, text=True).stdout.strip().splitlines()[0]
        except (OSError, IndexError):
            return None

    here = Path(__file__).resolve().parent
    # A bundle says what it was built from; elsewhere it is the checkout.
    build = here / "BUILD"
    built = build.read_text().split()[1] if build.is_file() else None
    versions = {}
    for name in ("torch", "triton", "peft", "unsloth", "lorafusion", "vllm"):
        try:
            import importlib.metadata
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    cuda = device == "cuda"
    return dict(
        gpu=torch.cuda.get_device_name() if cuda else None,
        driver=said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        toolkit=torch.version.cuda, cpu=None if cuda else platform.processor() or platform.machine(), versions=versions,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=built or said("git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*") or "unknown",
        command=command, rows=[],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there, after every shape")
    parser.add_argument("--shapes", choices=SHAPES, default=None, help="default: llama; on a CPU tiny")
    parser.add_argument("--dropout", type=float, help="in place of that of the shapes")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="no shape is begun after this long")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, per shape and rank")
    parser.add_argument("--dram", action="store_true", help="count bytes of memory with ncu instead of timing")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--once", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        return once(arguments)
    names = arguments.ways.split(",")
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        parser.error(f"--ways has {', '.join(unknown)}, expected some of {', '.join(WAYS)}")
    if arguments.dropout is not None and not 0.0 <= arguments.dropout < 1.0:
        parser.error(f"--dropout is {arguments.dropout}, expected 0 or more and less than 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU: tiny layers on the CPU, which show that the script works and nothing else")
        torch.set_num_threads(min(2, torch.get_num_threads()))
    if arguments.list:
        layer = Layer(64, 96, 128, 16, 0.0, device, torch.bfloat16)
        for name in ready(layer, names):
            print(f"  {name:<11} runs")
        for name, reason in WITHOUT.items():
            print(f"  {name:<11} not run: {reason}")
        return None
    if arguments.dram and not (device == "cuda" and shutil.which("ncu")):
        sys.exit("peers: --dram needs a GPU and ncu on PATH")
    run, clock = machine(device, " ".join(["peers.py", *sys.argv[1:]])), Clock(device)
    begin = time.monotonic()
    for m, n, k, ranks, dropout in SHAPES[arguments.shapes or ("llama" if device == "cuda" else "tiny")]:
        dropout = dropout if arguments.dropout is None else arguments.dropout
        for r in ranks:
            print(f"\n{m} x {n} x {k}, R = {r}, dropout {dropout}", flush=True)
            if time.monotonic() - begin > 60 * arguments.minutes:
                print("  the time is up: not measured")
                continue
            layer = Layer(m, n, k, r, dropout, device, torch.bfloat16)
            functions = ready(layer, names)
            cases = calls_of(functions, layer)
            if arguments.dram:
                rows = [row for op, way in cases if (row := dram_row(arguments, layer, op, way))]
                for row in rows:
                    print(f"  {row['way']:<11} {row['op']:<8} {row['dram_bytes'] / 2**30:8.3f} GiB in {row['launches']} kernels")
            else:
                rows = rows_of(layer, measure(cases, clock, arguments.seconds))
                for row in rows:
                    tax = "" if row["tax_percent"] is None else f"tax {row['tax_percent']:+7.1f} %"
                    print(f"  {row['way']:<11} {row['op']:<8} {row['us']:10.1f} us  {row['tflops']:8.2f} TFLOP/s  {tax}")
            run["rows"] += rows
            if arguments.json:
                arguments.json.write_text(json.dumps(run, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
