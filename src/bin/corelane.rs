//! The operator's tool; everything is in `corelane::tools`.
fn main() -> std::process::ExitCode {
    corelane::tools::main()
}
