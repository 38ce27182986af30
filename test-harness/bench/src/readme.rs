//! The summary's place in a README, between two marks.

use std::fs;
use std::io;
use std::path::Path;

const BEGIN: &str = "<!-- bench:begin -->";
const END: &str = "<!-- bench:end -->";

/// Writes `summary` between the marks of a file, in place of what is there.
pub fn write(file: &Path, summary: &str) -> io::Result<()> {
    let about = |error: io::Error| io::Error::other(format!("{}: {error}", file.display()));
    let text = fs::read_to_string(file).map_err(about)?;
    let text = placed(&text, summary).ok_or_else(|| {
        about(io::Error::other(format!(
            "there is no `{BEGIN}` with `{END}` after it"
        )))
    })?;
    fs::write(file, text).map_err(about)
}

/// `None` where the marks are missing or in the wrong order.
fn placed(text: &str, summary: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    let summary = summary.trim();
    Some(format!("{before}{BEGIN}\n{summary}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_between_the_marks_is_replaced() {
        let text = format!("# A\n{BEGIN}\nold\n{END}\nrest\n");
        let fresh = placed(&text, "new\n").unwrap();
        assert_eq!(fresh, format!("# A\n{BEGIN}\nnew\n{END}\nrest\n"));
        assert_eq!(placed(&fresh, "new").unwrap(), fresh);
        assert_eq!(placed("no marks", "new"), None);
        assert_eq!(placed(&format!("{END} {BEGIN}"), "new"), None);
    }

    #[test]
    fn a_file_without_marks_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("README.md");
        fs::write(&file, "text").unwrap();
        let error = write(&file, "new").unwrap_err().to_string();
        assert!(
            error.contains("README.md") && error.contains(BEGIN),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&file).unwrap(), "text");
    }
}
