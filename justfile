# The front door. `uv run just` lists the recipes; .ci/run calls the same ones.

packages := "algos datasets rollout learner launch"

default:
    @just --list --unsorted

# Create the environment from uv.lock.
setup:
    uv sync --locked

# Format, and mend what ruff can mend.
fmt:
    uv run ruff format packages tests benchmarks examples
    uv run ruff check --fix packages tests benchmarks examples

# Formatting and lint rules.
lint:
    uv lock --check
    uv run ruff format --check packages tests benchmarks examples
    uv run ruff check packages tests benchmarks examples

# Static types: strict for algos, standard elsewhere.
types:
    uv run basedpyright

# The arrows between packages.
contracts:
    uv run lint-imports

# Every package installs and imports alone, with only what it declares.
isolated:
    for name in {{packages}}; do \
        echo "== hone-$name alone" && \
        uv run --isolated --exact --package "hone-$name" --no-default-groups python -W error::ImportWarning -c "import hone.$name" || exit 1; \
    done

# The whole test suite.
test *args:
    uv run pytest {{args}}

# The peers' wheels are plain Python, whatever their tags say: one and the same everywhere. Hashes are verified.

# Install the peers' releases apart, into .peers/ and without dependencies, for tests/parity.
peers:
    uv pip install --quiet --no-deps --no-build --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
        --target .peers -r tests/parity/requirements.txt

# TRL with all its dependencies in an environment of its own, for tests/parity/test_trl_trainers.py.
trainers:
    uv venv --quiet --allow-existing .peers-trainers --python 3.11
    uv pip install --quiet --python .peers-trainers/bin/python trl==1.16.0 torch==2.13.0 transformers==5.19.0

# For tests/rollout/test_foreign.py and examples/foreign: all of them, or those that are named.

# Agent frameworks whose pins cannot live beside vLLM's, each in an environment of its own under .foreign/.
foreign *names="verifiers gem openenv art nemo_gym":
    for name in {{names}}; do \
        case $name in art|nemo_gym) python=3.12 ;; *) python=3.11 ;; esac; \
        uv venv --quiet --allow-existing .foreign/$name --python $python && \
        uv pip install --quiet --no-deps --compile-bytecode --python .foreign/$name/bin/python \
            -r tests/rollout/foreign/$name.txt || exit 1; \
    done

# Benchmarks: ours beside a peer, ratios and shares of a roof, without the type-checking hook. Refuses a dirty tree.
bench *args:
    git diff --quiet HEAD
    uv run pytest benchmarks -o python_files="bench_*.py" --jaxtyping-packages= --benchmark-only {{args}}

# The main job, three seeds of each algorithm, judged against what it must reach.
smoke:
    uv run python benchmarks/main_job.py

# Rewrite the golden curves after a change of numerics that was meant (the diff goes into the commit).
golden:
    uv run python -m tests.golden.curves
    uv run python -m tests.golden.offline_curves

# Rewrite the generated pages.
docs:
    uv run python -m hone.algos.table > docs/algorithms.md
    uv run python -m hone.launch.observe.metrics > docs/metrics.md
