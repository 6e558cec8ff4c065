"""Tests of scripts/report, on files made up here: python3 -m unittest scripts/report_test.py"""
import json
import subprocess
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

REPORT = Path(__file__).resolve().parent / "report"


def row(way, r, us, **more):
    shape = dict(op="forward", dtype="bf16", m=8, n=16, k=32)
    return shape | dict(way=way, r=r, us=us, spread=0.01, tflops=1000 / us) | more


def run_file(date, rows, **more):
    return dict(gpu="NVIDIA Test", driver="1", commit="c0", command="test", date=date, rows=rows) | more


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
        self.write("a.json", run_file("2026-01-01", rows))
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
        self.write("a.json", run_file("2026-01-01", [], label="poll 4"))
        self.assertIn("labelled `poll 4`", self.report(status=1))


if __name__ == "__main__":
    unittest.main()
