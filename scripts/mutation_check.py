"""Break the diffusion code in ways that have really happened, and see that a test fails each time.

    python scripts/mutation_check.py      # prints a Markdown table; exit code 1 if a mutation survives

Every mutation is made in a copy of the checkout, so nothing here is changed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str
    old: str
    new: str
    tests: str


GRAPH, SUBSTITUTION = "protlig_dd/diffusion/graph.py", "protlig_dd/diffusion/substitution.py"
NUMERICS = "protlig_dd/diffusion/numerics.py"
SAMPLING, LIKELIHOOD = "protlig_dd/diffusion/sampling.py", "protlig_dd/diffusion/likelihood.py"
MUTATIONS = [
    Mutation("Q[x, y] for Q[y, x] in the loss", SUBSTITUTION, "return self._spectrum(x).rates.T[x]",
             "return self._spectrum(x).rates[x]", "tests/test_graph.py"),
    Mutation("no constant term, absorbing", GRAPH, " + kappa * (log_kappa - 1)", "", "tests/test_graph.py"),
    Mutation("no constant term, uniform, unmoved", GRAPH, " + (n - 1) / n * rho * (log_rho - 1)", "",
             "tests/test_graph.py"),
    Mutation("no constant term, uniform, moved", GRAPH, " + (k_inverse_rho - (n - 2)) / n", "", "tests/test_graph.py"),
    Mutation("no constant term, substitution", SUBSTITUTION, " + r * (r.log() - 1)", "", "tests/test_graph.py"),
    Mutation("exp() - 1 in float32 for expm1", SUBSTITUTION,
             "growth = torch.expm1(sigma[:, None] * process.eigenvalues)",
             "growth = ((sigma[:, None] * process.eigenvalues).float().exp() - 1).double()", "tests/test_graph.py"),
    Mutation("s^T exp(-delta Q) with the factors swapped", SUBSTITUTION,
             "return row + ((row @ process.left) * growth) @ process.right",
             "return row + ((row @ process.right.T) * growth) @ process.left.T", "tests/test_graph.py"),
    Mutation("P[x, z] for P[z, x] in the reverse steps", SUBSTITUTION, " * pi[xt.to(pi.device)][:, None] / pi", "",
             "tests/test_graph.py"),
    Mutation("the posterior step over sigma for sigma - left", SUBSTITUTION, "self._into(xt, sigma - left)",
             "self._into(xt, sigma)", "tests/test_graph.py"),
    Mutation("float32 Gumbel noise for the float64 inverse CDF", NUMERICS, "    cdf = probs_TS.cumsum(-1)\n",
             "    noise = -(-torch.rand(probs_TS.shape).log()).log()\n"
             "    return (probs_TS.float().log() + noise).argmax(-1)\n    cdf = probs_TS.cumsum(-1)\n",
             "tests/test_graph.py"),
    Mutation("draws with the digits of float32", NUMERICS, "device=generator.device, dtype=torch.float64)",
             "device=generator.device).double()", "tests/test_graph.py"),
    Mutation("logits rounded to bf16", "protlig_dd/diffusion/score.py", "return self.model(batch, shown).float()",
             "return self.model(batch, shown).bfloat16().float()", "tests/test_score.py"),
    Mutation("scores of the wrong sign of log(e^sigma - 1)", GRAPH,
             "scaled = logits - (log_expm1(sigma) + math.log(self.n_states))[:, None]",
             "scaled = logits + (log_expm1(sigma) - math.log(self.n_states))[:, None]", "tests/test_score.py"),
    Mutation("cu_seqlens shifted by one", "protlig_dd/batch.py",
             "bounds.astype(np.int32)", "(bounds + 1).astype(np.int32)", "tests/test_batch.py"),
    Mutation("positions that run on through the pack", "protlig_dd/batch.py",
             "np.arange(bounds[-1]) - np.repeat(bounds[:-1], length_n)", "np.arange(bounds[-1])",
             "tests/test_batch.py"),
    Mutation("no factor 1 - t_min in the loss", "protlig_dd/diffusion/loss.py", "(t_max - noise.t_min) * dsigma_T",
             "t_max * dsigma_T", "tests/test_loss.py"),
    Mutation("no prior term in the bound", LIKELIHOOD,
             "nats_T += to_float64(graph.prior_kl(batch.tokens, sigma_T))",
             "nats_T += 0 * to_float64(graph.prior_kl(batch.tokens, sigma_T))", "tests/test_likelihood.py"),
    Mutation("no reconstruction term in the bound", LIKELIHOOD,
             "draw_T + _reconstruction_draw(score_fn, batch, graph, noise, generator)", "draw_T",
             "tests/test_likelihood.py"),
    Mutation("no factor 1 - t_min in the bound", LIKELIHOOD, "return (1 - noise.t_min) * to_float64(dsigma",
             "return to_float64(dsigma", "tests/test_likelihood.py -m 'not slow'"),
    Mutation("k masked positions weighed by k/L", LIKELIHOOD,
             "* (length_n / count_n).index", "* (count_n / length_n).index",
             "tests/test_likelihood.py -m 'not slow'"),
    Mutation("the trend over t counted as noise of the bound", LIKELIHOOD,
             "variance_n = squares_kn.mean(0) / draws", "variance_n = nats_kn.var(0) / draws",
             "tests/test_likelihood.py -k a_sequences_standard_error"),
    Mutation("one generator for all sequences of a pack", SAMPLING,
             "draw(length, one) for length, one in zip(lengths, generator, strict=True)",
             "draw(length, generator[0]) for length, one in zip(lengths, generator, strict=True)",
             "tests/test_sampling.py -m 'not slow'"),
    Mutation("an Euler step over all times, t_min or not", SAMPLING, "float(dsigma[i]) * (1 - noise.t_min) / steps",
             "float(dsigma[i]) / steps", "tests/test_sampling.py -m 'not slow'"),
    Mutation("a cache that does not see the last change", SAMPLING, "        self.batch = batch\n",
             "        self.batch = self.batch or batch\n", "tests/test_sampling.py -m 'not slow'"),
    Mutation("steered log-scores replaced by those of the x0 that they imply",
             "protlig_dd/diffusion/score.py", "return log_score + (after - before)", "return after",
             "tests/test_sampling.py -m 'not slow'"),
]  # fmt: skip


def main() -> int:
    survived = 0
    print("| mutation | file | the test that fails |\n| --- | --- | --- |")
    for mutation in MUTATIONS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "checkout"
            hidden = shutil.ignore_patterns(".*", "runs", "data.h5", "*.egg-info")
            shutil.copytree(ROOT, copy, ignore=hidden)
            source = (copy / mutation.file).read_text()
            if source.count(mutation.old) != 1:
                print(f"error: {mutation.what}: {mutation.old!r} occurs {source.count(mutation.old)} times",
                      file=sys.stderr)  # fmt: skip
                return 1
            (copy / mutation.file).write_text(source.replace(mutation.old, mutation.new))
            result = subprocess.run(
                f"{sys.executable} -P -m pytest -x -q -p no:cacheprovider {mutation.tests}",
                shell=True, cwd=copy, capture_output=True, text=True, env=environment(copy), check=False,
            )  # fmt: skip
        failed = [line.split(" - ")[0] for line in result.stdout.splitlines() if line.startswith("FAILED ")]
        survived += not failed
        verdict = f"`{failed[0].removeprefix('FAILED ').partition('[')[0]}`" if failed else "**none**"
        print(f"| {mutation.what} | {Path(mutation.file).name} | {verdict} |", flush=True)
    return int(survived > 0)


def environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


if __name__ == "__main__":
    sys.exit(main())
