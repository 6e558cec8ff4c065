"""Tests of scripts/report and benches/peers/dram.py, on files made up here: python3 -m unittest scripts/report_test.py"""
import json
import subprocess
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "scripts/report"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "test-2026-01-01-0123456.json"


def row(way, r, us, **more):
    shape = dict(op="forward", dtype="bf16", m=8, n=16, k=32)
    flops = 2 * (8 * 16 * 32 + 8 * r * (16 + 32))
    return shape | dict(way=way, r=r, us=us, spread=0.01, tflops=flops / us / 1e6) | more


def bytes_row(op, way, read, written, **more):
    shape = dict(op=op, way=way, dtype="bf16", m=8192, n=4096, k=4096, r=16)
    return shape | dict(dram_bytes=read + written, dram_bytes_read=read, dram_bytes_written=written, launches=1) | more


def run_file(date, rows, **more):
    return dict(gpu="NVIDIA Test", driver="1", commit=COMMIT, command="test", date=date, rows=rows) | more


class Report(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.results = self.root / "benches/results"
        self.results.mkdir(parents=True)
        self.readme = self.root / "README.md"
        self.readme.write_text("before\n<!-- results: written by scripts/report -->\n<!-- results: end -->\nafter\n")

    def write(self, name, content):
        (self.results / name).write_text(json.dumps(content))

    def report(self, *flags, status=0):
        done = subprocess.run([sys.executable, REPORT, "--root", self.root, *flags], capture_output=True, text=True)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stdout + done.stderr

    def test_without_files_nothing_is_claimed(self):
        self.report("--check", status=1)
        self.report()
        self.assertIn("**not measured**", self.readme.read_text())
        self.assertIn("not measured", self.report("--model"))
        self.report("--check")

    def test_the_newest_run_counts_and_its_file_is_named(self):
        self.write("b.json", run_file("2026-02-01", [row("fused", 0, 100), row("fused", 16, 103, tax_percent=3.0)]))
        self.write("a.json", run_file("2026-01-01", [row("fused", 16, 150, tax_percent=50.0), row("cublaslt", 0, 99)]))
        self.report()
        text = self.readme.read_text()
        self.assertTrue(text.startswith("before\n") and text.endswith("after\n"))
        self.assertIn("103.0 (+3.0 %)", text)
        self.assertNotIn("150.0", text)
        self.assertIn("(benches/results/a.json)", text)
        self.assertIn("(benches/results/b.json)", text)

    def test_plots_are_svg_and_a_stale_one_is_noticed_and_removed(self):
        rows = [row("fused", 0, 100), row("fused", 16, 103, tax_percent=3.0, floor_percent=80.0), row("peft", 16, 140)]
        self.write(NAME, run_file("2026-01-01", rows))
        self.report()
        plots = sorted((self.results / "plots").iterdir())
        self.assertEqual([path.name for path in plots],
                         [f"nvidia-test-forward-{name}.svg" for name in ("roofline", "speed", "tax")])
        for path in plots:
            xml.dom.minidom.parse(str(path))
        self.report("--check")
        stale = self.results / "plots/gone.svg"
        stale.write_text("<svg/>")
        self.assertIn("gone.svg", self.report("--check", status=1))
        self.report()
        self.assertFalse(stale.exists())

    def test_a_number_edited_by_hand_fails(self):
        self.write(NAME, run_file("2026-01-01", [row("fused", 0, 100, floor_us=80.0, floor_percent=80.0), row("fused", 16, 103)]))
        self.report()
        self.report("--check")
        written = self.readme.read_text()
        self.readme.write_text(written.replace("103.0", "102.0"))
        self.assertIn("README.md is not what", self.report("--check", status=1))
        self.readme.write_text(written)
        run = json.loads((self.results / NAME).read_text())
        for field, value in (("us", 99), ("tflops", 1.0), ("floor_percent", 81.0)):
            edited = json.loads(json.dumps(run))
            edited["rows"][0][field] = value
            self.write(NAME, edited)
            self.report()
            self.assertRegex(self.report("--check", status=1), f"{NAME}: (tflops|floor_percent) of forward fused")
        self.write(NAME, run | {"commit": f"{COMMIT}-dirty"})
        self.assertIn("measured without changes", self.report("--check", status=1))
        self.write(NAME, run | {"date": "2026-01-02"})
        self.assertIn("its name has not its date", self.report("--check", status=1))

    def test_a_speed_outside_of_the_markers_fails(self):
        self.write(NAME, run_file("2026-01-01", [row("fused", 16, 103)]))
        self.report()
        text = self.readme.read_text()
        for claim in ("takes 87.6 ms", "790 TFLOP/s", "1.27 × faster than torch", "4.8 TB/s", "98 % of cuBLASLt", "a tax of 2 %"):
            self.readme.write_text(text + f"It {claim}.\n")
            self.assertIn(f"a speed that is in no file of benches/results: It {claim}.", self.report("--check", status=1))
        line = text.count("\n") + 1
        self.assertIn(f"README.md:{line}:", self.report("--check", status=1))
        self.readme.write_text(text + "16 bytes, sm_90, 128 x 256, two launches, 31 MiB, 2 % of the rows\n")
        self.report("--check")

    def test_bytes_of_memory_have_their_own_table(self):
        ours = bytes_row("forward", "fused", 5 << 20, 3 << 20, floor_bytes=4 << 20)
        self.write(NAME, run_file("2026-01-01", [row("fused", 16, 103), ours]))
        self.write("peers.json", run_file("2026-01-02", [bytes_row("step", "torch", 1 << 20, 1 << 20, dropout=0.1)]))
        self.report()
        text = self.readme.read_text()
        self.assertIn("| forward | 8 × 16 × 32 | bf16 | 16 | 103.0 |", text)
        self.assertIn("| op | M × N × K | dtype | R | with | fused | torch |", text)
        self.assertIn("| forward | 8192 × 4096 × 4096 | bf16 | 16 |  | 8 (2.00 ×) |  |", text)
        self.assertIn("| step | 8192 × 4096 × 4096 | bf16 | 16 | dropout 0.1 |  | 2 |", text)

    def test_what_a_call_has_beside_the_plain_adapter_keeps_rows_apart(self):
        features = [{}, {"adapters": 8}, {"dora": True}, {"projections": 3}, {"dora": True, "projections": 2}, {"dropout": 0.0, "adapters": 1}, {"full": True}]
        self.write(NAME, run_file("2026-01-01", [row("fused", 16, 100 + at) | of for at, of in enumerate(features)]))
        self.report()
        text = self.readme.read_text()
        for line in ("16 | 8 adapters | 101.0", "16 | DoRA | 102.0", "16 | 3 projections | 103.0", "16 | DoRA, 2 projections | 104.0", "16 | f32 factors | 106.0"):
            self.assertIn(line, text)
        self.assertIn("16 |  | 105.0", text, "what is written out is what is absent")

    def test_published_figures_stand_beside_what_was_measured(self):
        self.write(NAME, run_file("2026-01-01", [row("fused", 16, 103)]))
        self.assertIn("fused       not measured", self.report("--peers"))
        square = dict(m=4096, n=4096, k=4096)
        rows = [row("fused", 16, 100, **square), row("torch", 16, 150, **square), row("cublaslt", 0, 96, **square),
                bytes_row("forward", "fused", 1 << 29, 1 << 29), bytes_row("backward", "fused", 1 << 29, 1 << 28)]
        self.write(NAME, run_file("2026-01-01", rows))
        said = self.report("--peers")
        self.assertIn("fused       1.50 × on average, 1.50 × at most (1 of 21 shapes)", said)
        self.assertIn("fused       +4.2 %", said)
        self.assertIn("fused       1.750 GiB", said, "a step is its two launches")
        self.assertIn("lorafusion  not measured", said)

    def test_regressions_beyond_the_spread_are_listed(self):
        self.write("a.json", run_file("2026-01-01", [row("fused", 16, 100), row("fused", 64, 100)]))
        self.write("b.json", run_file("2026-02-01", [row("fused", 16, 101), row("fused", 64, 110)]))
        lines = [line for line in self.report().splitlines() if "->" in line]
        self.assertEqual(len(lines), 1)
        self.assertIn("R=64: 100.0 -> 110.0 us (+10.0 %), a.json -> b.json", lines[0])

    def test_predictions_beside_measurements(self):
        self.write("a.json", run_file("2026-01-01", [row("fused", 16, 100, predicted_us=90.0), row("fused", 64, 100)]))
        said = self.report("--model")
        self.assertIn("predicted 90.0 us, measured 100.0 us, error -10.0 %", said)
        self.assertIn("median error 10.0 % of 1 rows", said)

    def test_a_file_that_lacks_a_field_is_named(self):
        self.write("a.json", {"gpu": "x", "rows": [], "commit": "c", "date": "d"})
        self.assertIn("a.json has no command", self.report(status=1))
        self.write("a.json", run_file("2026-01-01", [{"op": "forward"}]))
        self.assertIn("a row of", self.report(status=1))
        self.write("a.json", run_file("2026-01-01", [dict(row("fused", 16, 1), us=None)]))
        self.assertIn("has no us or dram_bytes", self.report(status=1))
        self.write("a.json", run_file("2026-01-01", [], label="poll 4"))
        self.assertIn("labelled `poll 4`", self.report(status=1))


# As `ncu --csv --page raw --log-file` writes it; the numbers are made up.
NCU = """==PROF== Connected to process 4242 (/bundle/bin/example-tax)
==PROF== Profiling "lora_sm90_forward_bf16_256" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","","","","","","","","byte","Mbyte"
"0","4242","example-tax","127.0.0.1","lora_sm90_forward_bf16_256","1","13","(384, 1, 1)","(132, 1, 1)","0","9.0","100,663,296","67.108864"
"1","4242","example-tax","127.0.0.1","lora_sm90_backward_bf16_256(Arguments)","1","13","(384, 1, 1)","(132, 1, 1)","0","9.0","2000","0"
==PROF== Disconnected from process 4242
"""


class Dram(unittest.TestCase):
    """What `tax --once` launched, put together with what ncu counted."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        launch = dict(way="fused", dtype="bf16", m=8192, n=4096, k=4096, r=16, dropout=0.0, us=None, spread=None, floor_bytes=2e8)
        self.rows = [launch | dict(op="forward", what="lora_sm90_forward_bf16_256"),
                     launch | dict(op="backward", what="lora_sm90_backward_bf16_256")]

    def join(self, csv=NCU, rows=None, status=0):
        (self.root / "launches.json").write_text(json.dumps(run_file("2026-01-01", self.rows if rows is None else rows)))
        (self.root / "dram.csv").write_text(csv)
        files = [self.root / name for name in ("launches.json", "dram.csv", "out.json")]
        done = subprocess.run([sys.executable, "-B", ROOT / "benches/peers/dram.py", *files], capture_output=True, text=True)
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertEqual(files[2].is_file(), status == 0)
        return done.stdout + done.stderr

    def test_counts_become_rows_of_results(self):
        self.assertIn("needed    190.7 MiB", self.join())
        run = json.loads((self.root / "out.json").read_text())
        forward, backward = run["rows"]
        self.assertEqual((forward["dram_bytes_read"], forward["dram_bytes_written"]), (100663296, 67108864))
        self.assertEqual((forward["dram_bytes"], forward["floor_bytes"], forward["op"]), (167772160, 2e8, "forward"))
        self.assertEqual((backward["dram_bytes"], backward["r"], run["commit"]), (2000, 16, COMMIT))
        self.assertNotIn("us", forward)

    def test_other_kernels_than_were_launched_are_no_result(self):
        self.assertIn("number 1: lora_sm90_backward_bf16_256 launched", self.join(rows=self.rows[::-1], status=1))
        self.assertIn("1 kernels were launched and 2 counted", self.join(rows=self.rows[:1], status=1))
        without = "\n".join(line for line in NCU.splitlines() if not line.startswith('"1"'))
        self.assertIn("number 2: lora_sm90_backward_bf16_256 launched, none counted", self.join(without, status=1))

    def test_what_ncu_could_not_count_is_no_result(self):
        self.assertIn("kernel 2, lora_sm90_backward_bf16_256, is `n/a`", self.join(NCU.replace('"2000"', '"n/a"'), status=1))
        self.assertIn("is `nan`", self.join(NCU.replace('"2000"', '"nan"'), status=1))
        self.assertIn("is in `sector`", self.join(NCU.replace('"Mbyte"', '"sector"'), status=1))
        self.assertIn("no column dram__bytes_read.sum", self.join(NCU.replace("bytes_read", "bytes"), status=1))
        self.assertIn("columns", self.join(NCU.replace(',"67.108864"', ""), status=1))
        refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
        self.assertIn("ncu says: ==ERROR== ERR_NVGPUCTRPERM", self.join(refused, status=1))


if __name__ == "__main__":
    unittest.main()
