# Every target does its own set-up; see scripts/setup for what that may install.
.PHONY: demo test lint bench

# One build serves the demo, the tests and the lints: fail points are compiled in, and do nothing
# unless the environment names them.
FEATURES := --features failpoints

# Clusters, mounts and whole machines' worth of load: more tests at once only slow each other down.
TEST_THREADS ?= 2

demo:
	scripts/setup
	cargo build $(FEATURES) --bin highwater --example demo
	cargo run --quiet $(FEATURES) --example demo

test:
	scripts/setup reader stores
	cargo test $(FEATURES) -- --test-threads=$(TEST_THREADS)

lint:
	cargo fmt --check
	cargo clippy --all-targets $(FEATURES) -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps $(FEATURES)

# Figures of a busy machine mean little; see benches/README.md.
bench:
	scripts/setup
	cargo bench --bench hops --bench catch_up --bench first_copy
