"""The image, built for real by buildah on a base from debootstrap, and a job in it without a network.

`make image-test` runs it, as root; its base, wheels and layers stay in out/image-test, so a second run is shorter.
Plain `make test` only reads the Dockerfile.
"""

import configparser
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.utils import parse_wheel_filename

from sdworker.build.cache_dirs import environment
from sdworker.build.layers import split_layers
from sdworker.core.model_info import EMBEDDED
from sdworker.embedded.shapes import judge
from sdworker.lab.hub_server import Hub
from sdworker.serve.image_io import from_data_uri

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "out" / "image-test"
BASE, IMAGE, MODEL = "localhost/sdworker-base:dev", "localhost/sdworker:test", "shapes/embedded"
PROMPT = "a large red star on a blue background"
JOB = ("sdworker", "start", "--test-input", json.dumps({"input": {"prompt": PROMPT}}))
UNET = "model/unet/diffusion_pytorch_model-00001-of-00003.safetensors"
LAYER_BYTES = 3_000_000  # small, so that the denoiser is cut


def stages() -> dict[str, dict[str, str]]:
    """The variables that ENV sets in each stage of the Dockerfile."""
    lines = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    variables = {}
    for word, rest in re.findall(r"^(FROM|ENV) (.+)$", lines, re.M):
        if word == "FROM":
            stage = variables.setdefault(rest.split()[-1], {})
        else:
            stage |= dict(re.findall(r"(\w+)=(\S*)", rest))
    return variables


@pytest.mark.parametrize(("stage", "when"), [("bake", "build"), ("worker", "run")])
def test_caches_are_set_as_the_table_says(stage, when):
    assert environment(when).items() <= stages()[stage].items()


def test_hadolint_finds_nothing():
    subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], check=True)


def buildah(*arguments: object, before: tuple[str, ...] = (), check: bool = True, **options):
    """Run buildah with a storage of its own, so that nothing else on the machine is touched."""
    command = [*before, "buildah", "--root", KEPT / "storage", "--runroot", KEPT / "run", *arguments]
    ours = {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(KEPT / "tmp")}
    for _ in range(5):
        done = subprocess.run(command, env=os.environ | ours, text=True, **{"capture_output": True} | options)
        if "sealing memfd copy" not in (done.stderr or ""):  # buildah copies itself; the kernel may be busy with it
            break
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def base():
    """Debian with Python, in the place of python:3.11-slim-bookworm, for which a registry would be needed."""
    if os.geteuid() != 0:
        pytest.fail("buildah mounts, and debootstrap makes devices: run it as root")
    if missing := [name for name in ("buildah", "debootstrap") if not shutil.which(name)]:
        pytest.fail(f"{' and '.join(missing)} not found: make system-deps installs them")
    if sys.version_info[:2] != (3, 11):
        pytest.fail("the image's Python is 3.11, and its packages are those that are installed here")
    for name in ("storage", "run", "tmp"):
        (KEPT / name).mkdir(parents=True, exist_ok=True)
    buildah("rm", "--all")
    if len(buildah("images", "--all", "--quiet").stdout.split()) > 1000:  # layers that no build will use again
        buildah("rmi", "--all", "--force")
    try:
        if buildah("inspect", "--type", "image", BASE, check=False).returncode:
            make_base()
        yield
    finally:
        buildah("rm", "--all")  # buildah leaves the containers of a failed build, and mounts


def make_base() -> None:
    mirrors = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Codename: bookworm"],
                             check=True, capture_output=True, text=True).stdout.split()
    container = buildah("from", "scratch").stdout.strip()
    folder = Path(buildah("mount", container).stdout.strip())
    with (KEPT / "base.log").open("w") as log, TemporaryDirectory() as target:  # debootstrap cannot do with spaces
        packages = "python3,python3-venv,libpython3-dev,ca-certificates"  # Python's own images have its headers, too
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", target, *mirrors[:1]],
                       check=True, stdout=log, stderr=log)
        subprocess.run(["cp", "-a", f"{target}/.", folder], check=True)
    for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(folder / waste)
    (folder / "usr/lib/python3.11/sitecustomize.py").unlink()  # only Debian's Python has one
    # Debian's Python is 3.11.2; a package that asks for a later 3.11 may have been chosen for the Python here.
    (folder / "etc/pip.conf").write_text("[install]\nignore-requires-python = true\n")
    buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    buildah("commit", "--rm", container, BASE)


@pytest.fixture(scope="session")
def locks(base) -> dict[str, str]:
    """Fill KEPT/wheels with what is installed here; the texts of the lock files that name it."""
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    requirements_of = {f"{lock}.lock": " ".join(parser["DEFAULT"][name] for name in names) for lock, names in (
        ("worker", ["requirements"]), ("tests", ["requirements", "notebooks_requirements", "dev_requirements"]))}
    pip, wheels, pins = [sys.executable, "-m", "pip"], KEPT / "wheels", KEPT / "wheels" / "pins"
    installed = subprocess.run([*pip, "list", "--format=freeze", "--exclude-editable"], check=True, capture_output=True,
                               text=True).stdout + "".join(f"# {line}\n" for line in requirements_of.values())
    if not pins.exists() or pins.read_text() != installed:
        shutil.rmtree(wheels, ignore_errors=True)
        wheels.mkdir()
        (KEPT / "pins").write_text(installed)
        before = set()
        for lock, requirements in requirements_of.items():
            subprocess.run([*pip, "wheel", "-w", wheels, "-c", KEPT / "pins", *requirements.split()], check=True)
            new, before = set(wheels.glob("*.whl")) - before, set(wheels.glob("*.whl"))
            (wheels / lock).write_text("".join(sorted(map(locked, new))))
        (KEPT / "pins").rename(pins)
    return {lock: (wheels / lock).read_text() for lock in requirements_of}


def locked(wheel: Path) -> str:
    name, version, *_ = parse_wheel_filename(wheel.name)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def sources(folder: Path, locks: dict[str, str]) -> Path:
    """A copy of what git has or would take, and this machine's locks."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name, text in locks.items():
        (folder / ".runpod" / f"here-{name}").write_text(text)
    return folder


def build(folder: Path, log: Path, token: Path, tag: str = IMAGE, **arguments: str) -> int:
    """Build a folder's Dockerfile; returns the exit code."""
    arguments |= {"BASE_IMAGE": BASE, "REQUIREMENTS": ".runpod/here-worker.lock", "MODEL_ID": MODEL,
                  "TEST_REQUIREMENTS": ".runpod/here-tests.lock", "PIP_FIND_LINKS": "/wheels", "PIP_NO_INDEX": "1"}
    options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    with log.open("w") as stream:
        return buildah("bud", "--layers", "--format=docker", f"--tag={tag}", f"--secret=id=hf_token,src={token}",
                       f"--volume={KEPT / 'wheels'}:/wheels:ro", *options, folder,
                       check=False, capture_output=False, stdout=stream, stderr=subprocess.STDOUT).returncode


@pytest.fixture(scope="session")
def hub():
    with Hub({MODEL: EMBEDDED}, secrets.token_hex(20)) as hub:
        yield hub


@pytest.fixture(scope="session")
def image(hub, locks, tmp_path_factory) -> dict:
    """The image with the hub's model; its configuration."""
    shutil.rmtree(KEPT / "tmp")  # with the downloads of an earlier build: here they have to come from the hub
    (KEPT / "tmp").mkdir()
    token, log = tmp_path_factory.mktemp("secret") / "token", KEPT / "build.log"
    token.write_text(hub.token)
    code = build(sources(tmp_path_factory.mktemp("context"), locks), log, token,
                 MODEL_REVISION=hub.commit(MODEL), LAYER_BYTES=str(LAYER_BYTES), AOT="cpu",
                 HF_ENDPOINT=hub.url)
    assert code == 0, log.read_text()[-5000:]
    return json.loads(buildah("inspect", "--type", "image", IMAGE).stdout)["Docker"]["config"]


@pytest.fixture
def container(image) -> tuple[str, Path]:
    """A new container, and where its files are."""
    name = buildah("from", IMAGE).stdout.strip()
    return name, Path(buildah("mount", name).stdout.strip())


def inside(container: tuple[str, Path], *command: str, check: bool = True):
    """Run a command in a container, in a network that consists of a loopback interface."""
    alone = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    return buildah("run", container[0], "--", *command, before=alone, check=check)


WORK = """
import json, socket, sys, sdworker
sdworker.__path__.append("/queue/sdworker")
from sdworker.lab.queue_server import run_workers
prompt, settings = sys.argv[1], dict(one.split("=") for one in sys.argv[2:])
worker_run = run_workers(["sdworker", "start"], [{"id": "first", "input": {"prompt": prompt, "seed": 7}}],
                    settings, limit=400)
print(json.dumps([socket.if_nameindex(), worker_run.answers["first"], worker_run.log]))
"""


def drawn(container: tuple[str, Path], *settings: str) -> tuple[list, dict, str]:
    """Run a worker at a queue in a container; returns interfaces, answer and log. The image lacks the queue's code."""
    shutil.copytree(ROOT / "sdworker" / "lab", container[1] / "queue" / "sdworker" / "lab", dirs_exist_ok=True)
    return json.loads(inside(container, "python", "-c", WORK, PROMPT, *settings).stdout)


@pytest.mark.image
def test_a_job_is_answered_without_a_network(container):
    interfaces, answer, log = drawn(container)
    assert [name for _, name in interfaces] == ["lo"]
    assert all(judge(from_data_uri(answer["output"]["images"][0]), PROMPT).values())
    assert f"{MODEL} found baked into the image: /model" in log
    assert "Job local_test completed successfully" in inside(container, *JOB).stdout


@pytest.mark.image
def test_it_draws_with_the_code_that_was_compiled_in_the_build(container):
    """On the model as it is in the image, in shards; and with one byte changed it does without."""
    _, answer, _ = drawn(container)
    rows = answer["output"]["timings"]["cold_start"]
    assert "check package" in rows and "diffusers" not in rows and answer["output"]["warnings"] == []
    code, = (container[1] / "opt/compiled/aot").glob("*/denoiser.pt2")
    content = bytearray(code.read_bytes())
    content[len(content) // 2] ^= 1
    code.write_bytes(content)
    _, answer, _ = drawn(container)
    assert "diffusers" in answer["output"]["timings"]["cold_start"]
    assert "denoiser.pt2 in it is damaged" in answer["output"]["warnings"][0]
    assert all(judge(from_data_uri(answer["output"]["images"][0]), PROMPT).values())


@pytest.mark.image
def test_it_compiles_from_the_cache_that_was_filled_in_the_build(image, hub, locks, tmp_path):
    """In an image of its own, with a compiler; for another number format it says why not, and draws."""
    tag, token, log = f"{IMAGE}-compiling", tmp_path / "token", KEPT / "compiling.log"
    token.write_text(hub.token)
    code = build(sources(tmp_path / "context", locks), log, token, tag, MODEL_REVISION=hub.commit(MODEL),
                 LAYER_BYTES=str(LAYER_BYTES), COMPILE_CACHE="cpu", HF_ENDPOINT=hub.url)
    assert code == 0, log.read_text()[-5000:]
    name = buildah("from", tag).stdout.strip()
    container = name, Path(buildah("mount", name).stdout.strip())
    cached = "SDWORKER_COMPILE=cached"
    _, answer, log = drawn(container, cached)
    assert log.index("compiled in") < log.index("job first:"), log
    assert answer["output"]["warnings"] == []
    assert all(judge(from_data_uri(answer["output"]["images"][0]), PROMPT).values())
    _, answer, _ = drawn(container, cached, "SDWORKER_DTYPE=bfloat16")
    assert "was made for dtype float32, and here is bfloat16" in answer["output"]["warnings"][0]
    assert answer["output"]["images"]


@pytest.mark.image
def test_the_model_is_what_the_hub_has(container, hub, tmp_path):
    assert {request.file for request in hub.requests if request.cdn} == {str(Path(path).relative_to(EMBEDDED))
                                                                       for path in EMBEDDED.rglob("*.safetensors")}
    report = json.loads(inside(container, "sdworker", "verify", "/model", "--json").stdout)
    assert (report["repository"], report["revision"]) == (MODEL, hub.commit(MODEL))
    ours = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    subprocess.run([sys.executable, "-m", "sdworker.cli.main", "bake", MODEL, "--revision", hub.commit(MODEL), "--to",
                    tmp_path / "model"], env=ours, check=True, capture_output=True)
    split_layers(tmp_path / "model", tmp_path / "layers", limit=LAYER_BYTES)
    ours, = (tmp_path / "layers").glob("*/manifest.json")
    assert (container[1] / "model" / "manifest.json").read_text() == ours.read_text()
    cut = [entry for entry in json.loads(ours.read_text())["files"] if entry["cut_from"]]
    assert len(cut) == 4, "three shards and their index"


@pytest.mark.image
def test_one_byte_less_is_noticed(container):
    os.truncate(container[1] / UNET, (container[1] / UNET).stat().st_size - 1)
    for command in (("sdworker", "verify"), ("sdworker", "verify", "--quick"), JOB):
        done = inside(container, *command, check=False)
        assert done.returncode != 0 and f"/{UNET}" in done.stderr and "Traceback" not in done.stderr, command


@pytest.mark.image
def test_the_image_says_how_it_is_run(container, image):
    variables = dict(line.split("=", 1) for line in image["Env"])
    assert environment("run").items() <= variables.items()
    ours = [variables[name] for name in ("SDWORKER_MODEL", "SDWORKER_OFFLINE", "HF_HUB_OFFLINE")]
    assert ours == [MODEL, "1", "1"]
    assert (image["Cmd"], image["StopSignal"]) == (["sdworker", "start"], "SIGTERM")
    assert image["Healthcheck"]["Test"] == ["CMD", "sdworker", "verify", "--quick"]
    assert inside(container, *image["Healthcheck"]["Test"][1:]).stdout == "/model passed the quick check\n"
    folders = [variables[name].strip("/") for name in environment("run") if "VOLUME" not in name]
    assert all((container[1] / folder).is_dir() for folder in folders)


@pytest.mark.image
def test_all_is_compiled(container):
    """Taken as it is, since layers need not keep the files' times. One test of torch's is for Python 3.12."""
    for tree in ("usr/lib/python3.11", "opt/venv/lib", "opt/sdworker"):
        for path in (container[1] / tree).rglob("*.py"):
            if not path.name.startswith("py312_"):
                compiled = Path(importlib.util.cache_from_source(path)).read_bytes()[:8]
                assert compiled == importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little"), path


@pytest.mark.image
def test_nothing_is_in_the_image_that_only_builds_or_tests(container):
    tools = re.compile(r"(\S+-gnu-)?(gcc|cc|g\+\+|c\+\+|clang|make|nvcc|pip|pytest|jupyter|nbdev|nbval|ruff)([-_].*)?")
    packages = container[1] / "opt/venv/lib/python3.11/site-packages"
    commands = [path for folder in ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin", "opt/sdworker/bin")
                for path in (container[1] / folder).iterdir()]
    assert not [path for path in [*commands, *packages.iterdir()] if tools.fullmatch(path.name)]
    assert not list(container[1].rglob("*.ipynb"))
    assert not [path for path in (container[1] / "opt").rglob("tests") if path.is_dir()]
    ours = container[1] / "opt/sdworker/sdworker"
    assert {"serve", "embedded"} <= {path.name for path in ours.iterdir()} and not (ours / "lab").exists()
    assert not [path for name in ("training", "tiny_models") for path in (ours / "embedded").rglob(f"{name}*")]
    done = inside(container, "sdworker", "bench", check=False)
    assert done.returncode == 1 and "run it from an install of the package" in done.stderr, done.stderr


@pytest.mark.image
def test_the_token_is_nowhere(image, hub):
    """Not in a layer, a configuration, a history, the cache or the log: all that buildah has kept of all stages."""
    seen = subprocess.run(["grep", "-rhoaF", "-e", hub.token, "-e", hub.commit(MODEL), "--exclude-dir=merged", KEPT],
                          check=True, capture_output=True, text=True).stdout
    assert set(seen.split()) == {hub.commit(MODEL)}, "what is there is found"


@pytest.mark.image
def test_a_failing_notebook_stops_the_build_before_the_bake(locks, tmp_path):
    folder, log, token = sources(tmp_path / "context", locks), KEPT / "failing.log", tmp_path / "token"
    path = folder / "nbs/00_tour.ipynb"  # the first that is run
    notebook = json.loads(path.read_text())
    notebook["cells"].insert(2, {"cell_type": "code", "execution_count": None, "id": "wrong", "metadata": {},
                                 "outputs": [], "source": ["assert False"]})
    path.write_text(json.dumps(notebook))
    token.write_text("none")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.setblocking(False)
        code = build(folder, log, token, MODEL_REVISION="main", HF_ENDPOINT=f"http://127.0.0.1:{hub.getsockname()[1]}")
        assert code != 0 and f"FAILED {path.relative_to(folder)}" in log.read_text(), log.read_text()[-5000:]
        with pytest.raises(BlockingIOError):  # nobody has called
            hub.accept()
