# What contributors type; .ci/run does the same in a fresh environment.
.PHONY: help install test interruptions lint types docs links quick bench gpu fuzz sanitize clean

help:
	@echo "make install   build the kernels into this environment, with what the tests need"
	@echo "make test      the whole suite, in two processes"
	@echo "make interruptions   a run and a comparison of 40 runs, killed at 30 random moments: three minutes"
	@echo "make lint      formats and lint; make types: mypy and the stub of the compiled module"
	@echo "make docs      the pages, into build/docs/docs/index.html; make links: their links to other sites"
	@echo "make quick     the quick experiment on generated images"
	@echo "make bench     the fused step beside PyTorch and the memory's own speed"
	@echo "make fuzz      hours of random problems and attacks: 10,000 on each target, 20,000 steps in a row, FUZZ_SECONDS=600 by coverage"
	@echo "make sanitize  kernels and binding under the sanitizers of GCC"
	@echo "make gpu       build, tests, sanitizers and benchmark on this machine's GPU, into ./gpu-results"

install:
	pip install -e ".[test,dev]"

# Two processes; the tests of a file stay together, because they share what was dear to make.
test:
	pytest -n 2 --dist loadfile

interruptions:
	GRADPROM_KILLS=30 pytest -k 'thirty or clock' tests/train/test_interruptions.py

lint:
	ruff check .
	ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/**/*.h' 'tests/**/*.cpp' | xargs clang-format --dry-run --Werror

types:
	mypy
	stubtest gradprom_ext._C --mypy-config-file pyproject.toml --allowlist .ci/stubtest_allowlist.txt

# Everything anew each time: pages that are generated from the sources have none that Sphinx could look at.
docs:
	python -m sphinx --quiet --fresh-env --fail-on-warning --builder html --conf-dir docs . build/docs

links:
	python -m sphinx --quiet --fresh-env --builder linkcheck --conf-dir docs . build/links

quick:
	python -m train.run --dataset covidct --source phantom

bench:
	python -m gradprom_ext.bench --rounds 31

gpu:
	bash benchmarks/gpu.sh gpu-results

# With Clang and atheris installed, the binding is attacked by coverage too, for FUZZ_SECONDS on each kind of kernels.
fuzz:
	pytest --hypothesis-profile=fuzz tests/gradprom_ext/test_properties.py tests/gradprom_ext/test_fuzz.py tests/gradprom_ext/test_long_run.py
	.ci/fuzz cpu
	.ci/fuzz cuda-on-host

sanitize:
	.ci/sanitize

clean:
	rm -rf build dist *.egg-info gradprom_ext/_C*.so
