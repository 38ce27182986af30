//! The few arguments the fake engine heeds. It accepts all others, as it must
//! take any command line that the real engine takes, but for those that begin
//! with `--no-such-`: these it refuses as the real one refuses what it does not
//! know.

#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "one for each switch")]
pub(crate) struct Args {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) model: String,
    pub(crate) alias: Option<String>,
    pub(crate) parallel: usize,
    /// Tokens of context over all slots.
    pub(crate) ctx_size: u64,
    pub(crate) metrics: bool,
    pub(crate) slots: bool,
    pub(crate) embeddings: bool,
    pub(crate) reranking: bool,
    pub(crate) api_key: Option<String>,
    pub(crate) version: bool,
    pub(crate) list_devices: bool,
    /// The argument that is refused, if one is.
    pub(crate) refused: Option<String>,
}

impl Args {
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Self {
        let mut args = Self {
            host: "127.0.0.1".to_owned(),
            port: 8080,
            model: String::new(),
            alias: None,
            parallel: 1,
            ctx_size: 0,
            metrics: false,
            slots: true,
            embeddings: false,
            reranking: false,
            api_key: None,
            version: false,
            list_devices: false,
            refused: None,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_default();
            match argument.as_str() {
                "--host" => args.host = value(),
                "--port" => args.port = value().parse().unwrap_or(args.port),
                "-m" | "--model" => args.model = value(),
                "-a" | "--alias" => args.alias = Some(value()),
                "-np" | "--parallel" => args.parallel = value().parse().unwrap_or(1).max(1),
                "-c" | "--ctx-size" => args.ctx_size = value().parse().unwrap_or(0),
                "--api-key" => args.api_key = Some(value()),
                "--metrics" => args.metrics = true,
                "--no-slots" => args.slots = false,
                "--embeddings" | "--embedding" => args.embeddings = true,
                // As with the real one, embeddings come with it.
                "--reranking" | "--rerank" => {
                    args.reranking = true;
                    args.embeddings = true;
                }
                "--version" => args.version = true,
                "--list-devices" => args.list_devices = true,
                unknown if unknown.starts_with("--no-such-") => {
                    args.refused = Some(unknown.to_owned());
                }
                _ => {}
            }
        }
        args
    }

    /// What its answers call the model.
    pub(crate) fn model_name(&self) -> &str {
        self.alias.as_ref().unwrap_or(&self.model)
    }

    /// Context length of one slot, in tokens.
    pub(crate) fn slot_ctx(&self) -> u64 {
        match self.ctx_size {
            // The real engine takes the model's own length.
            0 => 8192,
            total => total / self.parallel as u64,
        }
    }
}
