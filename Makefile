# The commands of this repository. Each does all the set-up it needs, on a machine with nothing
# but Rust; what it does is in Rust too (`src/dev`), so that `cargo` alone does the same.

.DEFAULT_GOAL := help
.PHONY: help dev test bench faults fuzz lint fmt

help:
	@echo 'OpsMantik tells which ad click, visit and page made the phone ring.'
	@echo
	@echo '  make dev    run it here: PostgreSQL (installed if missing), a demo site and page, the server'
	@echo '              its data stays in .opsmantik/; Ctrl-C stops all of it'
	@echo '  make test   all tests, on a database of their own that is gone afterwards'
	@echo '  make faults the fault table, the long form: all that breaks is broken again and again'
	@echo '  make bench  what it can do on this machine, against references measured in the same run'
	@echo '  make fuzz   what reads bytes from strangers, fed with inputs that look for trouble: four targets, FUZZ_SECONDS=60 each'
	@echo '  make lint   what must hold before a commit: format, clippy'
	@echo '  make fmt    format the sources'
	@echo
	@echo 'More of it: make dev ARGS="--help", make test ARGS="name_of_a_test", make faults ARGS="--row kill-server"'
	@echo 'All that is checked before a merge: CI=true .ci/run'

dev:
	@cargo run --locked -- dev $(ARGS)

test:
	@cargo test --locked $(ARGS)

faults:
	@cargo test --locked --test faults -- --long $(ARGS)

bench:
	@cargo bench --locked --bench spine -- $(ARGS)

fuzz:
	@fuzz/run $(ARGS)

lint:
	@cargo fmt --check
	@cargo clippy --all-targets --locked -- -D warnings

fmt:
	@cargo fmt
