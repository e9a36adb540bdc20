import hashlib
import json
import subprocess
import sys
from pathlib import Path

from hone.launch.observe import manifest
from hone.launch.observe.redact import redact, redact_command


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_manifest_is_json_and_complete():
    made = manifest.collect(verb="ppo", seed=7, argv=["launch", "ppo"], environment={})
    assert json.loads(json.dumps(made)) == made
    assert (made["verb"], made["seed"], made["command"]) == ("ppo", 7, ["launch", "ppo"])
    assert made["packages"]["hone-launch"] != "not installed"
    assert made["hardware"]["cores"] >= 1 and made["hardware"]["memory_gb"] > 0 and made["hardware"]["cpu"]


def test_the_commit_is_that_of_tracked_code_only(tmp_path):
    source = tmp_path / "code.py"
    source.write_text("1")
    assert manifest.commit(source) == "none: this code is not tracked by a git checkout"
    git(tmp_path, "init", "-q")
    assert manifest.commit(source).startswith("none")  # inside a repository, yet not of it: an installed package
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert manifest.commit(source) == head
    source.write_text("2")
    assert manifest.commit(source) == f"{head}+changes"


def test_the_lock_is_the_nearest_above(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "uv.lock").write_text("lock")
    assert manifest.lock_hash(tmp_path / "a" / "b" / "code.py") == hashlib.sha256(b"lock").hexdigest()
    assert manifest.lock_hash(Path("/nowhere/code.py")).startswith("none: no uv.lock")


def test_what_is_not_installed_says_so():
    assert manifest._version("hone-that-does-not-exist") == "not installed"


def test_no_secret_survives_in_the_command_line():
    environment = {"WANDB_API_KEY": "s3cret-in-the-environment", "HOME": "/home/someone", "DEBUG_TOKEN": "1"}
    command = [
        *("launch", "ppo", "--reward.remote-url", "http://user:pass@localhost/score?api_key=abc&x=1"),
        *("--logger.wandb.key", "deadbeef", "--x.api-key=deadbeef", "--hub.token", "hf_" + "a" * 30, "s3cret-in-the-environment"),
        *("--data.input-key", "question", "--rollout.max-new-tokens", "16", "/home/someone/1"),
    ]
    assert redact_command(command, environment) == [
        *("launch", "ppo", "--reward.remote-url", "http://***@localhost/score?api_key=***&x=1"),
        *("--logger.wandb.key", "***", "--x.api-key=***", "--hub.token", "***", "***"),
        *("--data.input-key", "question", "--rollout.max-new-tokens", "16", "/home/someone/1"),
    ]


def test_token_shapes_are_struck_out_of_text():
    assert redact("Authorization: Bearer abc.def and ghp_" + "b" * 24, {}) == "Authorization: Bearer *** and ***"


def test_watching_a_run_needs_no_heavy_package():
    modules = sorted(path.stem for path in Path(manifest.__file__).parent.glob("*.py"))
    assert "report" in modules
    imports = "\n".join(f"import hone.launch.observe.{name}" for name in modules)
    heavy = ("torch", "ray", "vllm", "deepspeed", "transformers", "numpy", "psutil", "pyarrow")
    script = f"import sys\n{imports}\nprint([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
