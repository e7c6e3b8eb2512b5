//! The operator's tool. Its code is in `corelane::tools`.
fn main() -> std::process::ExitCode {
    corelane::tools::main_generic()
}
