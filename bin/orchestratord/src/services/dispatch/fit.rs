//! Whether a task's prompt and answer fit the engine's context.

use adapter_host::{AdapterHost, HostError};
use llama_orch_types::{EngineKind, ProvisionedContext};
use worker_adapters_adapter_api::{TaskInput, WorkerError};

use super::trouble::Trouble;
use crate::services::event_log::Failure;
use crate::services::pool::Submission;

/// Makes sure that prompt and answer fit the context. Counting costs a call to
/// the engine, so it is done only where the text's length leaves a doubt.
pub async fn fit(
    host: &AdapterHost,
    context: &ProvisionedContext,
    submission: &mut Submission,
) -> Result<(), Failure> {
    let fits = make_fit(host, context, submission).await;
    fits.map_err(|trouble| trouble.failure)
}

pub(super) async fn make_fit(
    host: &AdapterHost,
    context: &ProvisionedContext,
    submission: &mut Submission,
) -> Result<(), Trouble> {
    if matches!(submission.task.input, TaskInput::Call(_)) {
        // It says itself how much is wanted, and the engine whether that fits.
        submission.fits = true;
        return Ok(());
    }
    let task = &mut submission.task;
    if certainly_fits(
        &task.input,
        Added::by(context),
        task.max_tokens,
        context.ctx,
    ) {
        submission.fits = true;
        return Ok(());
    }
    let counted = host.count_tokens(&context.pool_id, &task.input).await;
    let prompt = match counted {
        Ok(prompt) => prompt,
        // The engine will say itself that something does not fit.
        Err(HostError::Worker(WorkerError::NotOffered { .. })) => {
            submission.fits = true;
            return Ok(());
        }
        Err(error) => return Err(Trouble::from(&error)),
    };
    let room = context.ctx.saturating_sub(prompt);
    if room == 0 {
        let failure = Failure::context_exceeded(prompt, None, context.ctx);
        return Err(failure.in_pool(&context.pool_id).into());
    }
    if task.max_tokens > room {
        if submission.max_tokens_given {
            let failure = Failure::context_exceeded(prompt, Some(task.max_tokens), context.ctx);
            return Err(failure.in_pool(&context.pool_id).into());
        }
        task.max_tokens = room;
    }
    submission.fits = true;
    Ok(())
}

/// The most tokens that a chat template adds to what the messages say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Added {
    once: usize,
    per_message: usize,
}

impl Added {
    /// What is around a text in any case, such as the mark of its beginning.
    const AROUND: usize = 4;

    /// What llama-server uses for a model that brings no template, ChatML. A token is
    /// at least one byte long: `<|im_start|>assistant\n` at the end, and
    /// `<|im_start|>`, `\n` and `<|im_end|>\n` with each message.
    const CHATML: Self = Self {
        once: 22 + Self::AROUND,
        per_message: 24,
    };

    /// As far as the engine's template is known; one that is not bounds nothing.
    fn by(context: &ProvisionedContext) -> Option<Self> {
        let model = context.model.as_ref()?;
        let another = |flag: &String| {
            flag.starts_with("--chat-template") || flag.starts_with("--override-kv")
        };
        if context.engine != EngineKind::Llamacpp || context.flags.iter().any(another) {
            return None;
        }
        let own = model.chat_template.as_deref();
        Some(own.map_or(Self::CHATML, Self::by_template))
    }

    /// Bounded by the template's own length, once for the whole and a few tokens for
    /// each message.
    fn by_template(template: &str) -> Self {
        Self {
            once: template.len(),
            per_message: 16,
        }
    }
}

/// A token of text is at least one byte long, so few bytes are few tokens.
fn certainly_fits(input: &TaskInput, added: Option<Added>, max_tokens: u32, ctx: u32) -> bool {
    let added = match (input, added) {
        (TaskInput::Prompt(_), _) => Added::AROUND,
        (TaskInput::Messages(messages), Some(added)) => {
            added.once + added.per_message * messages.len()
        }
        (TaskInput::Messages(_), None) | (TaskInput::Call(_), _) => return false,
    };
    input.len_bytes() + added + max_tokens as usize <= ctx as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::pool::tests::context;
    use llama_orch_types::{Digest, ModelMetadata};
    use worker_adapters_adapter_api::ChatMessage;

    #[test]
    fn only_a_text_shorter_than_the_room_is_known_to_fit() {
        let prompt = |bytes: usize| TaskInput::Prompt("x".repeat(bytes));
        assert!(certainly_fits(&prompt(100), None, 100, 1000));
        assert!(!certainly_fits(&prompt(950), None, 100, 1000));
        let chat = TaskInput::Messages(Vec::new());
        let added = Some(Added::by_template("{{ messages }}"));
        assert!(certainly_fits(&chat, added, 900, 1000));
        assert!(!certainly_fits(&chat, added, 990, 1000));
        assert!(!certainly_fits(&chat, None, 1, 1000), "an unknown template");
    }
    #[test]
    fn the_engines_own_template_adds_no_more_than_is_reckoned() {
        let messages = [("system", "a"), ("user", "bc"), ("assistant", "")];
        let rendered: String = messages
            .iter()
            .map(|(role, content)| format!("<|im_start|>{role}\n{content}<|im_end|>\n"))
            .chain(["<|im_start|>assistant\n".to_owned()])
            .collect();
        let input = TaskInput::Messages(
            messages
                .iter()
                .map(|(role, content)| ChatMessage {
                    role: (*role).to_owned(),
                    content: (*content).to_owned(),
                })
                .collect(),
        );
        let most = u32::try_from(rendered.len() + Added::AROUND).unwrap();
        assert!(certainly_fits(&input, Some(Added::CHATML), 0, most));
        assert!(!certainly_fits(&input, Some(Added::CHATML), 1, most));
    }

    #[test]
    fn a_template_that_flags_name_is_not_known() {
        let mut context = context();
        context.model = Some(ModelMetadata {
            id: "m".to_owned(),
            path: "m.gguf".into(),
            digest: Digest::from_bytes([0; 32]),
            size_bytes: 1,
            architecture: None,
            quantization: None,
            parameter_count: None,
            ctx_max: None,
            chat_template: None,
            shape: None,
        });
        assert_eq!(Added::by(&context), Some(Added::CHATML));
        context.flags = vec!["--chat-template-file".to_owned(), "x.jinja".to_owned()];
        assert_eq!(Added::by(&context), None);
        context.flags.clear();
        context.model = None;
        assert_eq!(Added::by(&context), None);
    }
}
