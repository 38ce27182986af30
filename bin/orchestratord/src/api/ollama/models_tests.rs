use super::*;

#[test]
fn numbers_of_weights_are_said_in_short() {
    assert_eq!(in_short(134_515_008), "134.52M");
    assert_eq!(in_short(8_030_261_312), "8.0B");
    assert_eq!(in_short(1_000), "1.00K");
}

#[test]
fn capabilities_are_judged_by_the_template_and_the_flags() {
    let text = |template: &str, flags: &[&str]| {
        let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
        capabilities(Serves::Text, template, &flags)
    };
    assert_eq!(text("", &[]), ["completion"]);
    assert_eq!(
        text("{% if tools %}", &["--mmproj", "x.gguf"]),
        ["completion", "tools", "vision"]
    );
    assert_eq!(text("{{ enable_thinking }}", &[])[1], "thinking");
    assert_eq!(
        capabilities(Serves::Embeddings, "tools", &[]),
        ["embedding"]
    );
}

#[test]
fn facts_are_told_under_the_names_of_the_file() {
    let facts = Facts {
        architecture: Some("llama".to_owned()),
        ctx_max: Some(8192),
        parameters: Some(7),
        ..Facts::default()
    };
    let info = Value::Object(model_info(&facts));
    let expected = json!({
        "general.architecture": "llama", "llama.context_length": 8192,
        "general.parameter_count": 7,
    });
    assert_eq!(info, expected);
    assert_eq!(modified(&facts), "0001-01-01T00:00:00Z");
    assert_eq!(
        Details::of(&Facts::default()).families,
        Vec::<String>::new()
    );
}
