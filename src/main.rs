//! Arguments in, exit code out.

fn main() -> std::process::ExitCode {
    rhei::cli::main()
}
