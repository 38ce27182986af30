fn main() -> std::process::ExitCode {
    orchestratord::main()
}
