"""Tests of exported models.

They cover bit-identical logits, use in place of a run, loading without Hydra, damaged files, and a hub.
"""

import base64
import contextlib
import csv
import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from Bio.Align import substitution_matrices
from safetensors.torch import save_file

from protlig_dd import __version__
from protlig_dd.batch import PackedBatch
from protlig_dd.data.store import SequenceStore
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.exported import EXPORTED, WEIGHTS
from protlig_dd.inference.model import find_saved, load_trained
from protlig_dd.runs.checkpoint import complete_checkpoints, load_tensors
from protlig_dd.system.files import sha256
from protlig_dd.tokenizer import AMINO_ACIDS, ProteinTokenizer

from .conftest import ROOT, Command, MadeOnce, assert_one_line_error, random_batch, thorough
from .test_training import TINY, train

KINDS = {
    "absorbing": ["model.norm=rms", "model.qk_norm=true"],
    "named": ["graph=blosum62", "optim.name=adamw"],
    "substitution": ["graph=substitution", "graph.matrix=private/blosum.txt", "noise=geometric", "optim.name=adamw"],
}


def rank(number: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for rank `number` of two ranks."""
    return {"RANK": str(number), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, store: SequenceStore, python: Command, made_once: MadeOnce) -> Path:
    """A folder with a run, runs/base, and its export, models/base."""

    def fill(folder: Path) -> None:
        (folder / "private").mkdir()
        (folder / "private/blosum.txt").write_text(substitution_matrices.load("BLOSUM62").format("%4d"))
        run = partial(python, cwd=folder)
        train(
            run,
            store,
            "base",
            *KINDS[request.param],
            "trainer.max_steps=6",
            "optim.lr=0.01",
            "optim.warmup_steps=2",
            "trainer.device=cpu",
            "trainer.precision=fp32",
            "report.samples=2",
            "report.steps=4",
        )
        process = run("-m", "protlig_dd.export", "from=runs/base", "to=models/base")
        assert process.returncode == 0, process.stderr
        assert "models/base: runs/base/checkpoints/step_00000006, weights " in process.stdout

    return made_once(request.param, fill)


@pytest.mark.slow
def test_an_export_computes_the_same_as_its_checkpoint(
    exported: Path, store: SequenceStore, run_python: Command
) -> None:
    run, model = exported / "runs/base", exported / "models/base"
    assert {path.name for path in model.iterdir()} == set(EXPORTED)
    checkpoint = complete_checkpoints(run)[-1]
    assert (model / WEIGHTS).read_bytes() == (checkpoint / "ema.safetensors").read_bytes()
    first, second = (load_trained(str(path), device="cpu", precision="fp32") for path in (run, model))
    batch, sigma = random_batch([30, 7, 61]), torch.tensor([0.1, 1.0, 5.0])
    hub = ProteinDiffusion.from_pretrained(model, device="cpu")
    with torch.no_grad():
        logits = first.score_fn.logits(batch, sigma)
        assert logits.abs().max() > 0.01
        for other in (second.score_fn, hub.score_fn):
            assert torch.equal(logits, other.logits(batch, sigma))
            assert torch.equal(first.score_fn(batch, sigma), other(batch, sigma))
        assert torch.equal(logits, hub(batch, sigma))
    t = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for other in (second.score_fn.noise, hub.noise):
        assert torch.equal(torch.stack(first.score_fn.noise(t)), torch.stack(other(t)))
    assert (second.run, second.step, second.max_len) == (first.run, 6, 200)
    assert second.lengths == first.lengths is not None
    assert second.saved.config.optim == first.saved.config.optim
    for text in (path.read_text() for path in model.iterdir() if path.name != WEIGHTS):
        assert "private" not in text  # no paths of this machine
        assert str(exported) not in text
        assert ".h5" not in text
    vocabulary = json.loads((model / "vocabulary.json").read_text())
    assert [vocabulary["ids"][letter] for letter in AMINO_ACIDS] == list(range(vocabulary["n_states"]))
    assert vocabulary["ids"]["<mask>"] == 20
    report = json.loads((run / "report.json").read_text())
    card = (model / "README.md").read_text()
    for name, key, sign in (
        ("bound on the negative log-likelihood", "nll", ""),
        ("unigram model", "unigram_nll", ""),
        ("difference to the unigram model, paired", "difference", "+"),
    ):
        assert f"| {name} | {report[key]:{sign}.4f} ± {report[f'{key}_se']:.4f} |" in card
    rows = list(csv.DictReader((run / "report.csv").read_text().splitlines()))
    residues = sum(int(row["residues"]) for row in rows)
    bound = sum(float(row["nll_nats"]) for row in rows) / residues
    assert f"| {bound:.4f} ± " in card
    assert (
        f"On {len(rows)} proteins of the test split, {residues:,} residues (at most the first 200 of each protein)"
        in card
    )
    assert "| network | 2 blocks, width 32, 4 heads |" in card
    assert "| steps | 6, seed 0; averaged weights |" in card
    assert "# license: " in card
    assert "protlig_dd is not on a package index: run `pip install .` in a checkout" in card
    assert f" and install protlig_dd-{__version__}-py3-none-any.whl. Then" in card  # test_training.py builds that wheel
    assert find_saved(str(run)).data_fingerprint in card

    sampled = []
    for source in (run, model):
        process = run_python(
            "-m",
            "protlig_dd.sample",
            f"from={source}",
            f"output={source.name}{len(sampled)}.fasta",
            "n=2",
            "steps=4",
            "device=cpu",
            "precision=fp32",
            cwd=exported,
        )
        assert process.returncode == 0, process.stderr
        sampled.append((exported / f"{source.name}{len(sampled)}.fasta").read_text())
    assert sampled[0] == sampled[1]
    tuned = run_python(
        "-m",
        "protlig_dd.training",
        *[o for o in TINY if not o.startswith("model.")],
        "from=models/base",
        "run.name=tuned",
        "trainer.max_steps=1",
        "optim.lr=1e-30",
        "trainer.device=cpu",
        "trainer.precision=fp32",
        "trainer.compile=false",
        f"data.path={store.path}",
        cwd=exported,
    )
    assert tuned.returncode == 0, tuned.stderr
    weights = load_tensors(find_saved(str(exported / "runs/tuned")).weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_tensors(model / WEIGHTS).items())
    inside = run_python(
        "-m",
        "protlig_dd.export",
        "from=.",
        f"to='{exported}/models/inside[/b]'",
        cwd=exported / "runs/base/checkpoints/step_00000006",
    )
    assert inside.returncode == 0, inside.stderr
    assert (exported / "models/inside[/b]/config.json").read_text() == (model / "config.json").read_text()
    shared = run_python("-m", "protlig_dd.export", "from=runs/tuned", "to=models/tuned", cwd=exported, **rank(0))
    assert shared.returncode == 0, shared.stderr
    assert "| fine-tuned from | base |" in (exported / "models/tuned/README.md").read_text()
    other = run_python("-m", "protlig_dd.export", "from=runs/tuned", "to=models/tuned", cwd=exported, **rank(1))
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")
    again = run_python("-m", "protlig_dd.export", "from=runs/base", "to=models/base", cwd=exported)
    assert_one_line_error(again, "models/base exists already")
    twice = run_python("-m", "protlig_dd.export", "from=models/base", "to=models/other", cwd=exported)
    assert_one_line_error(twice, "models/base is an exported model already")


BLOCKED = """
import importlib.metadata, sys
import torch, safetensors.torch  # and their dependencies
class Blocked:
    def find_spec(self, name, path=None, target=None):
        allowed = "protlig_dd", "einops", "jaxtyping", "wadler_lindig", "numpy", "beartype"
        if name.split(".")[0] in packages and name.split(".")[0] not in allowed:
            raise ImportError(f"{name} must not be imported")
packages = importlib.metadata.packages_distributions().keys() - sys.modules.keys()
sys.meta_path.insert(0, Blocked())
from protlig_dd.hub import ProteinDiffusion
assert "Bio" in packages and "scipy" in packages and "omegaconf" in packages
model = ProteinDiffusion.from_pretrained(sys.argv[1], device="cpu")
vectors = model.embed(["MKTAYIAKQRQISFVKSH", "MSH" * 100], long="window")
from safetensors.torch import save_file
save_file({"vectors": vectors}, sys.argv[2])
model.save_pretrained(sys.argv[3])
try:
    ProteinDiffusion.from_pretrained("owner/name")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exported", KINDS if thorough() else ["named"], indirect=True)
def test_an_export_loads_with_torch_and_safetensors_alone(exported: Path, tmp_path: Path, run_python: Command) -> None:
    model = exported / "models/base"
    process = subprocess.run(  # in a new interpreter: a fork has imported the blocked modules already
        [sys.executable, "-c", BLOCKED, str(model), "vectors.safetensors", "copy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "owner/name is not a local folder, and huggingface_hub is not installed: pip install" in process.stdout
    for name in EXPORTED:
        assert (tmp_path / "copy" / name).read_bytes() == (model / name).read_bytes()
    vectors = load_tensors(tmp_path / "vectors.safetensors")["vectors"]
    (tmp_path / "two.fasta").write_text(f">a\nMKTAYIAKQRQISFVKSH\n>b\n{'MSH' * 100}\n")
    command = ["-m", "protlig_dd.embed", f"from={model}", "input=two.fasta", "output=two.npz", "long=window"]
    process = run_python(*command, "device=cpu", "precision=fp32")
    assert process.returncode == 0, process.stderr
    assert np.allclose(np.load(tmp_path / "two.npz")["embeddings"], vectors.numpy(), atol=1e-5)


@pytest.mark.slow
def test_changed_weights_are_saved_without_the_old_figures(exported: Path, tmp_path: Path) -> None:
    model = ProteinDiffusion.from_pretrained(exported / "models/base", device="cpu")
    assert not model.training
    assert torch.equal(model.embed(["mkt", "MSH"]), model.embed(["MKT", "MSH"]))
    for wrong in ("MKT", []):
        with pytest.raises(ValueError, match="embed takes a list of sequences, got "):
            model.embed(wrong)
    with torch.no_grad():
        model.network.head.out.bias += 1
    model.save_pretrained(tmp_path / "changed")
    again = ProteinDiffusion.from_pretrained(tmp_path / "changed", device="cpu")
    assert torch.equal(again.network.head.out.bias, model.network.head.out.bias)
    assert again.description["report"] is None
    assert "The run has no report of this step." in again.card
    with pytest.raises(ValueError, match="changed exists already"):
        model.save_pretrained(tmp_path / "changed")


@pytest.mark.slow
def test_the_functions_in_the_docs_take_an_exported_model(exported: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sharing.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "SamplerOptions" in block)
    names: dict[str, Any] = {"model": ProteinDiffusion.from_pretrained(exported / "models/base", device="cpu")}
    exec(code, names)
    assert len(names["designed"]) == 120
    assert set(names["designed"].tolist()) <= set(range(20))
    assert names["bound"].nats.shape == (1,)
    assert torch.isfinite(names["bound"].nats).all()


def test_damaged_and_foreign_exports_are_rejected(exported: Path, tmp_path: Path) -> None:
    def without_noise(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key != "noise"}

    source = exported / "models/base"

    def assert_rejected(message: str, **files: Any) -> None:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        for name in EXPORTED:
            (folder / name).write_bytes((source / name).read_bytes())
        for name, content in files.items():
            name = name.replace("_", ".")
            if callable(content):
                content = json.dumps(content(json.loads((folder / name).read_text())))
            (folder / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_trained(str(folder), device="cpu", precision="fp32")
        with pytest.raises(ValueError, match=message):
            ProteinDiffusion.from_pretrained(folder, device="cpu")

    assert_rejected("config.json: cannot be read", config_json="{")
    assert_rejected("config.json: not a JSON object", config_json="[]")
    assert_rejected("config.json: not a model that protlig_dd has exported", config_json='{"model_type": "bert"}')
    assert_rejected(
        "config.json has format 99; this version of protlig_dd reads only format 1",
        config_json=lambda found: found | {"format_version": 99},
    )
    assert_rejected("model.safetensors: SHA-256", model_safetensors="pickle")
    assert_rejected("vocabulary.json: token ids differ", vocabulary_json=lambda found: found | {"n_states": 21})
    assert_rejected("config.json: damaged, or not written by protlig_dd", config_json=without_noise)
    assert_rejected(
        "graph.name=os.system: choose from", config_json=lambda found: found | {"graph": {"name": "os.system"}}
    )
    description = json.loads((source / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({k: v for k, v in description.items() if k != "step"}))
    with pytest.raises(ValueError, match=r"config.json: damaged, or not written by protlig_dd \(KeyError\('step'\)\)"):
        load_trained(str(tmp_path / "model"), device="cpu", precision="fp32")
    weights = load_tensors(source / WEIGHTS)
    weights.pop("head.out.bias")
    save_file(weights, tmp_path / "short.safetensors")
    (tmp_path / "short").mkdir()
    for name in EXPORTED:
        (tmp_path / "short" / name).write_bytes((source / name).read_bytes())
    (tmp_path / "short.safetensors").replace(tmp_path / "short" / WEIGHTS)
    description["weights_sha256"] = sha256(tmp_path / "short" / WEIGHTS)
    (tmp_path / "short/config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"head\.out\.bias is missing"):
        ProteinDiffusion.from_pretrained(tmp_path / "short", device="cpu")
    description["training"]["run"]["name"] = "${oc.env:HOME}"
    (tmp_path / "short/config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has an interpolation"):
        find_saved(str(tmp_path / "short"))
    with pytest.raises(ValueError, match="not an exported model"):
        ProteinDiffusion.from_pretrained(exported / "runs", device="cpu")


AUTO_MODEL = """
import sys
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("MKTAYIAK", return_tensors="pt")
assert "protlig_dd" not in sys.modules
save_file({"logits": model(**inputs).logits.detach()}, sys.argv[2])
"""
REPOSITORY = "someone/proteins"
CLIENT = ("-m", "tests.hub_client")
COMMIT = hashlib.sha1(b"one").hexdigest()


@contextlib.contextmanager
def hub_server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Serve the part of a hub's HTTP interface that an upload and a download use.

    Every model has the same files, except that someone/gated is gated. The revision `missing` does not exist. Yield the
    server's address, and its files by name.
    """
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                found: Any = {"url": f"http://{self.headers['Host']}/{REPOSITORY}"}
            elif self.path == "/api/validate-yaml":
                found = {"errors": [], "warnings": []}
            elif self.path.endswith("/preupload/main"):
                wanted = [file["path"] for file in json.loads(body)["files"]]
                found = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]}
            else:
                assert self.path == f"/api/models/{REPOSITORY}/commit/main", self.path
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                found = {
                    "commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                }
            self.answer(json.dumps(found).encode(), Content_Type="application/json")

        def fail(self, code: int, reason: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/someone/gated"):
                self.fail(403, "GatedRepo")
                return
            if "/revision/missing" in self.path or "/tree/missing" in self.path:
                self.fail(404, "RevisionNotFound")
                return
            _, slash, name = self.path.partition(f"/resolve/{COMMIT}/")
            if slash:
                if name not in files:
                    self.fail(404, "EntryNotFound")
                    return
                etag = hashlib.sha256(files[name]).hexdigest()
                self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
                return
            listed = [
                {"rfilename": name, "path": name, "type": "file", "size": len(text), "oid": COMMIT}
                for name, text in files.items()
            ]
            found = {"id": REPOSITORY, "sha": COMMIT, "siblings": listed}
            self.answer(json.dumps(listed if "/tree/" in self.path else found).encode())

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", files
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["absorbing"], indirect=True)
def test_a_model_pushed_to_a_hub_is_pulled_unchanged(exported: Path, tmp_path: Path, run_python: Command) -> None:
    model = exported / "models/base"
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with hub_server() as (address, files):
        process = run_python(
            "-m", "tests.hub_client", "push", str(model), REPOSITORY, HF_ENDPOINT=address, **environment
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip().endswith(f"{REPOSITORY}/commit/{COMMIT}")
        assert files == {name: (model / name).read_bytes() for name in EXPORTED}
        other = environment | {"HF_HOME": str(tmp_path / "other")}
        process = run_python("-c", AUTO_MODEL, REPOSITORY, "logits.safetensors", HF_ENDPOINT=address, **other)
        assert process.returncode == 0, process.stderr
        files["pytorch_model.bin"] = b"somebody else's pickle"
        process = run_python(*CLIENT, "pull", REPOSITORY, "back", HF_ENDPOINT=address, **environment)
        assert process.returncode == 0, process.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        name: (model / name).read_bytes() for name in EXPORTED
    }
    assert not [*(tmp_path / "home").rglob("*.bin"), *(tmp_path / "home").rglob("*.py")]
    network = ProteinDiffusion.from_pretrained(model, device="cpu").network
    batch = PackedBatch.pack([torch.from_numpy(ProteinTokenizer().encode("MKTAYIAK"))])
    with torch.no_grad():
        logits = load_tensors(tmp_path / "logits.safetensors")["logits"][0, :, :20]
        torch.testing.assert_close(logits, network(batch, torch.zeros(1)), rtol=1e-5, atol=1e-5)
    offline = {"HF_HUB_OFFLINE": "1", **environment}
    process = run_python(*CLIENT, "pull", REPOSITORY, "cached", **offline)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "cached" / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert_one_line_error(
        run_python(*CLIENT, "pull", "someone/else", "x", **offline), "someone/else is not a local folder"
    )
    assert_one_line_error(
        run_python(*CLIENT, "pull", "no/such/folder", "x", **offline),
        "'no/such/folder' is neither a local folder nor the name of a model",
    )


@pytest.mark.parametrize("exported", ["absorbing"], indirect=True)
def test_a_dry_run_lists_what_would_be_uploaded_and_uses_no_network(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ProteinDiffusion.from_pretrained(exported / "models/base", device="cpu")

    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("a dry run must not use the network")

    monkeypatch.setattr("huggingface_hub.HfApi", no_network)
    for private in (True, False):
        listed = model.push_to_hub(REPOSITORY, private=private, dry_run=True).splitlines()
        sizes = {name: (exported / "models/base" / name).stat().st_size for name in EXPORTED}
        kind = "private" if private else "public"
        assert listed[0] == f"{REPOSITORY} ({kind} if it is new): {len(sizes)} files, {sum(sizes.values()):,} bytes"
        assert listed[1:] == [f"  {name}: {sizes[name]:,} bytes" for name in sorted(sizes)]
    for dry_run in (True, False):
        with pytest.raises(
            ValueError, match="'proteins' lacks the owner: give the name of a model on the hub as owner"
        ):
            model.push_to_hub("proteins", dry_run=dry_run)
        with pytest.raises(
            ValueError, match="'some one/x' cannot be the name of a model on the hub, owner/name: Repo id"
        ):
            model.push_to_hub("some one/x", dry_run=dry_run)
