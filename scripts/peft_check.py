"""Loads adapters with PEFT onto the recorded Llama and compares the logits with the recorded ones.

    peft_check.py LLAMA ROOT

LLAMA holds base/ and inputs.safetensors; each folder in ROOT an adapter and logits.safetensors. Exit status 0 if each
adapter loads without a warning, changes the base model's logits, and agrees with its own.
"""

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(llama: Path, root: Path) -> int:
    torch.set_num_threads(1)
    inputs = load_file(llama / "inputs.safetensors")
    failed = 0
    adapters = sorted(root.iterdir())
    for adapter in adapters:
        base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32, attn_implementation="eager")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, adapter).eval()
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"]).logits
        expected = load_file(adapter / "logits.safetensors")["f32/logits"]
        error = ((logits - expected).norm() / expected.norm()).item()
        change = ((expected - inputs["base/f32/logits"]).norm() / expected.norm()).item()
        said = [str(warning.message) for warning in caught if "adapter" in str(warning.message).lower()]
        # f32 sums in another order; the adapter's own share is larger by orders of magnitude.
        ok = error < 1e-6 < 1e-3 < change and not said
        failed += not ok
        print(f"{adapter.name}: relative error {error:.1e}, adapter's share {change:.1e}: {'ok' if ok else 'FAILED'}", *said)
    print(f"{len(adapters) - failed} of {len(adapters)} adapters agree with PEFT")
    return 1 if failed or not adapters else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
