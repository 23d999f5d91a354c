# make demo: answer a real question.  make test: run everything in a fresh environment.
# make coverage: measure what the tests run.  make wheel: build and use it as users would.
PYTHON ?= python3
# Modules are compiled when they are first imported: most of what torch brings never is.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile \
  --constraint constraints.txt

.PHONY: demo test coverage wheel clean

demo: .venv/installed
	.venv/bin/python -m minifuse.generate --method origin,logit_avg,fused \
	  --prefix @examples/five_shots.txt \
	  "What is the capital of France?" \
	  "Which city is the capital of France?" \
	  "France has which capital city?" \
	  "Can you name the capital of France?" \
	  "In which city does the government of France sit?"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"minifuse needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) --editable .
	touch $@

test:
	rm -rf .venv-test
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP_INSTALL) --editable '.[test]'
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/python -m pytest --numprocesses auto --dist loadfile

# Which lines of minifuse/ the tests run, in the environment of the last `make test`; it takes about
# half as long again. Compiled graphs are not traced; the eager tests run the same code.
coverage:
	.venv-test/bin/coverage erase
	.venv-test/bin/coverage run -m pytest --numprocesses auto --dist loadfile
	.venv-test/bin/coverage combine --quiet
	.venv-test/bin/coverage report

# The wheel as users have it: installed into an environment of its own, run in an empty folder.
wheel:
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python $(PIP_INSTALL) "$$(echo dist/minifuse-*.whl)[eval]"
	cd "$$(mktemp -d)" && PYTHON=$(CURDIR)/.venv-wheel/bin/python && set -ex && \
	  $$PYTHON -m minifuse.generate --no-compile --method all --max-new-tokens 4 \
	    "What is the capital of France?" "Which city is the capital of France?" && \
	  $$PYTHON -m minifuse.inspect --no-compile --output picture.svg "Who wrote Hamlet?" "Hamlet is by" && \
	  $$PYTHON -m minifuse.evaluate --no-compile --dataset $(CURDIR)/examples/questions.jsonl \
	    --limit 2 --shots 1 --paraphrases 2 --methods fused,logit_avg --max-new-tokens 3 --output run && \
	  $$PYTHON -m minifuse.tools.convert_weights smollm2-135m-instruct-q4_1 converted --quantize int8 && \
	  ls run converted picture.svg

clean:
	rm -rf .venv .venv-test .venv-wheel dist
