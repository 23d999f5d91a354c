# make demo: answer a real question.  make test: run everything in a fresh environment.
# make coverage: measure what the tests run.
PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test coverage clean

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

clean:
	rm -rf .venv .venv-test
