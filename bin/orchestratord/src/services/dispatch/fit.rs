//! Whether a task's prompt and answer fit the engine's context.

use adapter_host::{AdapterHost, HostError};
use llama_orch_types::ProvisionedContext;
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
    let model = context.model.as_ref();
    let template = model.and_then(|model| model.chat_template.as_deref());
    if certainly_fits(&task.input, template, task.max_tokens, context.ctx) {
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

/// A token of text is at least one byte long, so few bytes are few tokens. What
/// a chat template adds is bounded by its own length, once for the whole and a
/// few tokens for each message; an unknown template bounds nothing.
fn certainly_fits(input: &TaskInput, template: Option<&str>, max_tokens: u32, ctx: u32) -> bool {
    const AROUND_PROMPT: usize = 4;
    const PER_MESSAGE: usize = 16;
    let added = match (input, template) {
        (TaskInput::Prompt(_), _) => AROUND_PROMPT,
        (TaskInput::Messages(messages), Some(template)) => {
            template.len() + PER_MESSAGE * messages.len()
        }
        (TaskInput::Messages(_), None) | (TaskInput::Call(_), _) => return false,
    };
    input.len_bytes() + added + max_tokens as usize <= ctx as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_text_shorter_than_the_room_is_known_to_fit() {
        let prompt = |bytes: usize| TaskInput::Prompt("x".repeat(bytes));
        assert!(certainly_fits(&prompt(100), None, 100, 1000));
        assert!(!certainly_fits(&prompt(950), None, 100, 1000));
        let chat = TaskInput::Messages(Vec::new());
        assert!(certainly_fits(&chat, Some("{{ messages }}"), 900, 1000));
        assert!(!certainly_fits(&chat, Some("{{ messages }}"), 990, 1000));
        assert!(!certainly_fits(&chat, None, 1, 1000), "an unknown template");
    }
}
