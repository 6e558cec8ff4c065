"""Writes which modules random configurations target in PEFT, and with which rank and scale.

    PYTHONPATH=.toolchain/peft python3 scripts/peft_matching.py tests/golden/peft/matching_random.json [SEED] [CASES]

The format is that of matching.json beside it; tests/peft.rs reads both. `make peft-check` installs PEFT.
"""

import json
import math
import random
import sys

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

NAMES = """model.layers.0.self_attn.q_proj model.layers.0.self_attn.v_proj model.layers.1.self_attn.q_proj
model.layers.1.self_attn.k_proj model.layers.11.self_attn.o_proj model.layers.0.mlp.up_proj model.layers.1.mlp.down_proj
model.layers.1.mlp.experts.3.up_proj model.layers.10.experts.1.w1 model.embed_tokens lm_head model.lm_head_extra q_proj my_q_proj
model.my_q_proj x-y.q_proj h.0.attn.c_attn transformer.h.1.mlp.c_fc encoder.layer.1.attention.self.query score classifier.dense
vision.layers.1.q_proj model.visual.blocks.2.attn.qkv layers.7.q_proj h.3.0.q 0.1.2.3 a.b x.a_b proj""".split()
PARTS = """q_proj k_proj layers.1 self_attn model w1 c_attn lm_head mlp dense up_proj 1 layers.0.self_attn.q_proj score h.0 proj a.b b
query""".split()
EXPRESSIONS = [
    r".*\.(q|v)_proj", r"(?!.*vision).*q_proj", r".*layers\.(0|1)\..*", r"q_proj|k_proj", r"(q|k)_proj$", r".*\d+\..*proj",
    r"^model.*", r"(?P<x>.)_proj", r".*(?<=self_attn\.)q_proj", r"model\.layers\.\d{1,2}\.self_attn\.[qv]_proj", r"[^.]*",
    r".*\.q.proj", r"(.*\.)?\1?q_proj", r"(?i)Q_PROJ", r".*attn.*", r"\w+\.\w+", r".*\bq_proj\b", r".*", r"\S+\.w\d", r".{3,9}", r"",
    r"model\.(?:layers|h)\..+?\.w1", r".*[.]q_proj", r"layers\.1\.mlp\.up_proj",
    r"(?:.*?(?:vision|visual).*?(?:attn|mlp).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|up_proj)))",
]  # fmt: skip
LAYERS = ["layers", "h", ["h", "layers"], [], ["experts"], "layer", "(layers|h)", "l.*s"]


def pattern(rng, most):
    keys = PARTS + EXPRESSIONS + ["^" + part for part in PARTS] + [part.replace(".", "\\.") for part in PARTS]
    return {rng.choice(keys): rng.randint(1, 9) for _ in range(rng.randint(0, most))}


def config(rng):
    def names():
        return rng.sample(PARTS, rng.randint(1, 3))

    made = {"target_modules": names() if rng.random() < 0.6 else rng.choice(EXPRESSIONS)}
    if rng.random() < 0.2:
        made["exclude_modules"] = names() if rng.random() < 0.5 else rng.choice(EXPRESSIONS)
    if rng.random() < 0.2:
        made["modules_to_save"] = rng.sample(PARTS + EXPRESSIONS, rng.randint(1, 2))
    if isinstance(made["target_modules"], list) and rng.random() < 0.4:
        made["layers_to_transform"] = rng.choice([0, 1, 11, [0, 1], [11], [], [3]])
        if rng.random() < 0.5:
            made["layers_pattern"] = rng.choice(LAYERS)
    made |= {"r": 8, "lora_alpha": rng.choice([8, 16, 3]), "use_rslora": rng.random() < 0.3}
    return made | {"rank_pattern": pattern(rng, 4), "alpha_pattern": pattern(rng, 3)}


def matched(made):
    found = {}
    for name in NAMES:
        target = check_target_module_exists(LoraConfig(**made), name)
        if isinstance(target, _ExcludedModule):
            found[name] = "excluded"
        elif target:
            r = made["rank_pattern"].get(get_pattern_key(made["rank_pattern"], name), made["r"])
            alpha = made["alpha_pattern"].get(get_pattern_key(made["alpha_pattern"], name), made["lora_alpha"])
            found[name] = {"r": r, "lora_alpha": alpha, "scaling": alpha / (math.sqrt(r) if made["use_rslora"] else r)}
    return found


def main(out, seed=7, cases=150):
    rng = random.Random(int(seed))
    done = []
    while len(done) < int(cases):
        made = config(rng)
        try:
            found = matched(made)
        except Exception:  # no valid expression within PEFT's own, say
            continue
        order = {key: list(made[key]) for key in ("rank_pattern", "alpha_pattern")}
        done.append({"config": made, "matched": found, "pattern_order": order})
    with open(out, "w") as file:
        json.dump({"names": NAMES, "cases": done}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
