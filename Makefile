# Every target does its own set-up; see scripts/setup for what that may install.
.PHONY: demo test lint bench deb

# The demo, the tests and the lints use the same dependencies, built once: fail points are compiled in, and
# do nothing unless the environment names them.
FEATURES := --features failpoints

# `cargo clippy` and `cargo doc` would compile every dependency once more, without code, which no test can
# use. Here clippy takes the compiler's place for this crate alone, as it does under `cargo clippy`, but in a
# real build: what it has checked is what is tested. While you work, plain `cargo clippy` and `cargo test` do
# as well.
LINTED := RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-Dwarnings

# Many tests wait most of the time, but some are a whole machine's worth of load: on two cores three at once are the fastest.
TEST_THREADS ?= 3

demo:
	scripts/setup
	cargo build $(FEATURES) --bin highwater --example demo
	cargo run --quiet $(FEATURES) --example demo

test:
	scripts/setup reader stores spark postgres browser
	$(if $(shell command -v clippy-driver),$(LINTED)) cargo test $(FEATURES) -- --test-threads=$(TEST_THREADS)

lint:
	cargo fmt --check
	$(LINTED) cargo build --all-targets $(FEATURES)
	$(LINTED) RUSTDOC=scripts/rustdoc-lint RUSTDOCFLAGS="-D warnings" cargo test --doc $(FEATURES)

# Figures of a busy machine mean little; see benches/README.md.
bench:
	scripts/setup reader
	cargo bench --bench hops --bench catch_up --bench first_copy --bench history

# A Debian package; it wants cargo-deb.
deb:
	cargo build --release --locked --bin highwater
	mkdir -p target/deb
	target/release/highwater man > target/deb/highwater.1
	target/release/highwater completions bash > target/deb/highwater
	target/release/highwater completions zsh > target/deb/_highwater
	target/release/highwater completions fish > target/deb/highwater.fish
	cargo deb --no-build --no-strip
