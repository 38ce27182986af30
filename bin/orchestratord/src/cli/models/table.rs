//! Models as people read them. Pure.

use indicatif::HumanBytes;

use super::way::Pulled;
use crate::api::catalog::view::{Condition, ModelView, RemovedView, VerifiedView};
use crate::services::pulls::PullView;

const HEAD: [&str; 7] = [
    "NAME",
    "SIZE",
    "QUANT",
    "PARAMETERS",
    "USED BY",
    "LAST USED",
    "DIGEST",
];

/// How many digits stand for a digest.
const DIGITS: usize = 12;

/// A head and one line for each model, in columns, and what all of them take.
pub(super) fn table(models: &[ModelView]) -> Vec<String> {
    if models.is_empty() {
        return vec!["no models yet; `orchestratord models pull haiku` fetches one".to_owned()];
    }
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(models.iter().map(row));
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths: [usize; HEAD.len()] = std::array::from_fn(width);
    let line = |row: &[String; HEAD.len()]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    let stored = models.iter().filter(|model| model.stored);
    let total = stored.clone().map(|model| model.size_bytes).sum();
    lines.push(format!(
        "{} of {} in the store: {}",
        stored.count(),
        models.len(),
        HumanBytes(total)
    ));
    lines
}

fn row(model: &ModelView) -> [String; HEAD.len()] {
    let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    [
        name(model),
        HumanBytes(model.size_bytes).to_string(),
        or_unknown(&model.quantization),
        model
            .parameter_count
            .map_or_else(|| "-".to_owned(), parameters),
        used_by(model),
        minutes(&model.last_used),
        digits(&model.digest).to_owned(),
    ]
}

/// A profile, else the file's name; both with what is wrong.
fn name(model: &ModelView) -> String {
    let last = |text: &str| text.rsplit('/').next().unwrap_or(text).to_owned();
    let name = match model.profiles.first() {
        Some(profile) => profile.clone(),
        None => last(&model.source),
    };
    if model.spoilt_since.is_some() {
        format!("{name} (spoilt)")
    } else {
        name
    }
}

fn used_by(model: &ModelView) -> String {
    match (&model.used_by[..], model.in_use) {
        ([], true) => "in use".to_owned(),
        ([], false) => "-".to_owned(),
        (pools, _) => pools.join(", "),
    }
}

/// 134515008 is 135M.
fn parameters(count: u64) -> String {
    let count = count as f64;
    match count {
        small if small < 1e6 => format!("{small:.0}"),
        millions if millions < 999.5e6 => format!("{:.0}M", millions / 1e6),
        billions => format!("{:.1}B", billions / 1e9),
    }
}

/// An RFC 3339 time up to its minute.
fn minutes(time: &str) -> String {
    let shown = time.get(..16).unwrap_or(time);
    shown.replace('T', " ")
}

fn digits(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..DIGITS).unwrap_or(hex)
}

/// Everything about one model, a line for each fact.
pub(super) fn all_about(model: &ModelView) -> Vec<String> {
    let mut facts = vec![
        ("name", name(model)),
        ("digest", model.digest.clone()),
        (
            "size",
            format!(
                "{} ({} bytes)",
                HumanBytes(model.size_bytes),
                model.size_bytes
            ),
        ),
        ("file", model.path.clone()),
        (
            "kept",
            if model.stored {
                "in the store".to_owned()
            } else {
                "elsewhere; it is used where it lies and never removed".to_owned()
            },
        ),
    ];
    if !model.profiles.is_empty() {
        facts.push((
            "pinned by",
            format!("profile {}", model.profiles.join(", ")),
        ));
    }
    facts.push(("source", model.source.clone()));
    let others = model.references.iter().filter(|it| **it != model.source);
    facts.extend(others.map(|reference| ("also", reference.clone())));
    facts.extend(model.architecture.clone().map(|it| ("architecture", it)));
    facts.extend(model.quantization.clone().map(|it| ("quantisation", it)));
    let count = model.parameter_count;
    facts.extend(count.map(|it| ("parameters", format!("{} ({it})", parameters(it)))));
    facts.extend(model.ctx_max.map(|it| ("context", format!("{it} tokens"))));
    facts.push(("used by", used_by(model)));
    facts.push(("last used", model.last_used.clone()));
    facts.push(("verified", model.verified_at.clone()));
    let since = model.spoilt_since.clone();
    facts.extend(since.map(|it| {
        (
            "spoilt",
            format!("seen at {it}; it is mended before it is used again"),
        )
    }));
    let line = |(key, value): (&str, String)| format!("{key:13} {value}");
    facts.into_iter().map(line).collect()
}

pub(super) fn pulled(pulled: &Pulled) -> String {
    match (&pulled.result, &pulled.pull_id) {
        (Some(model), _) => format!(
            "{}  {}  {}  {}",
            pulled.model,
            HumanBytes(model.size_bytes),
            digits(&model.digest),
            model.path
        ),
        (None, id) => format!(
            "{} is on its way as pull {}",
            pulled.model,
            id.as_deref().unwrap_or_default()
        ),
    }
}

pub(super) fn cancelled(pull: &PullView) -> String {
    format!(
        "the pull of {} is cancelled; what has arrived ({}) is kept",
        pull.model,
        HumanBytes(pull.progress.bytes)
    )
}

pub(super) fn removed(removed: &RemovedView) -> String {
    let name = removed.names.first().unwrap_or(&removed.digest);
    if let Some(file) = &removed.kept_file {
        return format!("forgot {name}; {file} stays");
    }
    let again = match &removed.fetched_again_by[..] {
        [] => String::new(),
        pools => format!("; fetched again when loaded: {}", pools.join(", ")),
    };
    format!(
        "removed {name} ({}): {} freed{again}",
        digits(&removed.digest),
        HumanBytes(removed.bytes_freed)
    )
}

pub(super) fn verified(verified: &VerifiedView) -> String {
    let read = HumanBytes(verified.bytes_read);
    let digest = digits(&verified.digest);
    match verified.condition {
        Condition::Sound => format!("{digest} is sound: {read} read"),
        Condition::Mended => format!("{digest} was spoilt and is mended: {read} read"),
        Condition::Spoilt => format!("{digest} is spoilt"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn model(more: &serde_json::Value) -> ModelView {
        let mut view = json!({
            "digest": format!("sha256:{}", "ab".repeat(32)), "path": "/store/ab",
            "size_bytes": 98_362_432, "profiles": [], "references": ["hf:o/r/dir/m.gguf", "tiny"],
            "source": "hf:o/r/dir/m.gguf", "stored": true, "in_use": false, "used_by": [],
            "verified_at": "2026-01-02T03:04:05Z", "last_used": "2026-01-02T03:04:05.123Z",
        });
        for (key, value) in more.as_object().unwrap() {
            view[key] = value.clone();
        }
        serde_json::from_value(view).unwrap()
    }

    #[test]
    fn columns_stand_under_each_other() {
        let models = [
            model(
                &json!({ "profiles": ["haiku"], "quantization": "Q4_1", "parameter_count": 134_515_008, "used_by": ["default", "b"] }),
            ),
            model(
                &json!({ "stored": false, "spoilt_since": "2026-01-02T03:04:05Z", "in_use": true }),
            ),
        ];
        assert_eq!(
            table(&models),
            [
                "NAME             SIZE       QUANT  PARAMETERS  USED BY     LAST USED         DIGEST",
                "haiku            93.81 MiB  Q4_1   135M        default, b  2026-01-02 03:04  abababababab",
                "m.gguf (spoilt)  93.81 MiB  -      -           in use      2026-01-02 03:04  abababababab",
                "1 of 2 in the store: 93.81 MiB",
            ]
        );
        assert!(table(&[])[0].contains("models pull haiku"));
    }

    #[test]
    fn parameters_as_people_say_them() {
        let said: Vec<String> = [999_000, 1_700_000, 134_515_008, 999_600_000, 7_241_732_096]
            .map(parameters)
            .to_vec();
        assert_eq!(said, ["999000", "2M", "135M", "1.0B", "7.2B"]);
    }

    #[test]
    fn everything_about_a_model_is_a_line_each() {
        let lines = all_about(&model(&json!({ "ctx_max": 8192 }))).join("\n");
        for fact in [
            "digest        sha256:abab",
            "also          tiny",
            "context       8192 tokens",
            "kept          in the store",
            "used by       -",
        ] {
            assert!(lines.contains(fact), "{lines}");
        }
    }
}
