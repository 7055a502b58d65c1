//! docs/settings.md: every setting with its type, default, variable and meaning, from the JSON
//! schema of [`Settings`], which has the doc comments. `RHEI_BLESS=1` writes the page again.
//!
//! A doc comment ends in "Default: .." with a TOML value in a code span, or with words. A value is
//! tested: to write it down must change nothing, and to write another one must change something.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Config, Settings, override_from};

const PAGE: &str = "docs/settings.md";
const BEGIN: &str = "<!-- settings -->\n";
const END: &str = "<!-- end of settings -->\n";

/// One key of rhei.toml.
struct Setting {
    /// The tables that lead to it, and its name.
    path: Vec<String>,
    /// The values that it takes.
    kind: String,
    meaning: String,
    /// The text after "Default:", without the full stop.
    default: Option<String>,
    /// The values that are listed one by one, with what each means.
    choices: Vec<(String, String)>,
}

impl Setting {
    fn name(&self) -> String {
        self.path.join(".")
    }

    /// Returns the default, if it is a value and not a description of one.
    fn default_value(&self) -> Option<toml::Value> {
        let literal = self.default.as_ref()?.strip_prefix('`')?.strip_suffix('`')?;
        let table: toml::Table = toml::from_str(&format!("value = {literal}")).ok()?;
        table.get("value").cloned()
    }

    /// Returns the variable of the environment that overrides the key, if there is one.
    fn variable(&self) -> Option<String> {
        let name = format!("RHEI_{}", self.path.join("_").to_uppercase());
        let environment = BTreeMap::from([(name.clone(), "?".to_owned())]);

        let mut settings = Settings::default();
        let is_refused = override_from(&mut settings, &environment).is_err();
        let is_taken = format!("{settings:?}") != format!("{:?}", Settings::default());
        (is_refused || is_taken).then_some(name)
    }
}

/// The top level of the schema, and its definitions.
struct Schema(Value);

impl Schema {
    fn read() -> Self {
        Self(serde_json::from_str(&super::json_schema()).unwrap())
    }

    /// Follows a reference, also one beside "null".
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        if let Some(options) = schema["anyOf"].as_array()
            && let Some(option) = options.iter().find(|option| option["$ref"].is_string())
            && options.iter().any(|option| option["type"] == "null")
        {
            return self.resolve(option);
        }
        match schema["$ref"].as_str() {
            Some(reference) => self.resolve(self.0.pointer(&reference[1..]).unwrap()),
            None => schema,
        }
    }

    /// Returns the values that a key takes.
    fn kind(&self, schema: &Value) -> String {
        let schema = self.resolve(schema);
        if !choices(schema).is_empty() {
            let choices: Vec<String> = choices(schema).into_iter().map(|(name, _)| name).collect();
            return choices.join(" or ");
        }

        let own = &schema["type"];
        let own = own.as_str().or_else(|| own.as_array()?.first()?.as_str()).unwrap_or_default();
        match (own, text(schema)) {
            ("array", _) => format!("a list; each is {}", self.kind(&schema["items"])),
            ("object", _) => {
                format!("a table; each is {}", self.kind(&schema["additionalProperties"]))
            }
            ("boolean", _) => "true or false".to_owned(),
            ("integer", _) => "a whole number".to_owned(),
            ("string", described) if !is_key(schema) && !described.is_empty() => described,
            ("string", _) => "a text".to_owned(),
            (_, described) => described,
        }
    }

    /// Adds the keys of a table to `found`.
    fn settings(&self, table: &Value, path: &[String], found: &mut Vec<Setting>) {
        for (name, schema) in table["properties"].as_object().unwrap() {
            let path = [path, std::slice::from_ref(name)].concat();
            let (inner, entry) = (self.resolve(schema), &schema["additionalProperties"]);

            if inner["properties"].is_object() {
                self.settings(inner, &path, found);
            } else if self.resolve(entry)["properties"].is_object() {
                let entry_name = if path.len() == 1 { "\"schema.table\"" } else { "NAME" };
                let path = [path, vec![entry_name.to_owned()]].concat();
                self.settings(self.resolve(entry), &path, found);
            } else {
                let described = text(schema);
                let (meaning, default) = match described.rsplit_once("Default") {
                    Some((meaning, default)) => {
                        let default = default.trim_start_matches(':').trim().trim_end_matches('.');
                        (meaning.trim().to_owned(), Some(default.to_owned()))
                    }
                    None => (described, None),
                };
                let kind = self.kind(schema);
                found.push(Setting { path, kind, meaning, default, choices: choices(inner) });
            }
        }
    }
}

/// Returns whether a schema is that of a key, whose description is the key's and not its type's.
fn is_key(schema: &Value) -> bool {
    schema.get("default").is_some()
}

/// Returns the description of a schema on one line for each paragraph.
fn text(schema: &Value) -> String {
    let described = schema["description"].as_str().unwrap_or_default();
    let paragraphs: Vec<String> =
        described.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect();
    paragraphs.join("\n\n")
}

/// Returns the values that an enum lists, as they are written in rhei.toml, with their meanings.
fn choices(schema: &Value) -> Vec<(String, String)> {
    let listed = schema["oneOf"].as_array().into_iter().flatten();
    listed
        .filter(|choice| choice["const"].is_string())
        .map(|choice| (format!("`{}`", choice["const"]), text(choice)))
        .collect()
}

fn settings() -> Vec<Setting> {
    let (schema, mut found) = (Schema::read(), Vec::new());
    schema.settings(&schema.0, &[], &mut found);
    found
}

/// The part of the page that is written by this module.
fn page() -> String {
    let (schema, mut page, mut section) = (Schema::read(), String::new(), String::new());

    for setting in settings() {
        let first = setting.path.first().unwrap();
        if *first != section {
            section.clone_from(first);
            let properties = &schema.0["properties"][first];
            let described = [text(schema.resolve(properties)), text(properties)];
            let described = described.into_iter().find(|text| !text.is_empty()).unwrap_or_default();
            page += &format!("\n## [{section}]\n\n{described}\n");
        }

        page += &format!("\n### {}\n\n{}\n", setting.name(), setting.meaning);
        if !setting.choices.is_empty() {
            page += "\n";
        }
        for (value, meaning) in &setting.choices {
            page += &format!("- {value}: {meaning}\n");
        }

        let default = setting.default.clone().unwrap_or_else(|| "unset".to_owned());
        let variable = setting.variable().map_or_else(
            || "No variable.".to_owned(),
            |variable| format!("Variable: `{variable}`."),
        );
        page += &format!("\nType: {}. Default: {default}. {variable}\n", setting.kind);
    }
    page.push('\n');

    for entry in std::fs::read_dir("docs").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        page = page.replace(&format!("docs/{name}"), &format!("[{name}]({name})"));
    }
    page
}

/// Puts a value at a path of rhei.toml, or takes it away.
fn put(settings: &mut toml::Table, path: &[String], value: Option<toml::Value>) {
    let (name, tables) = path.split_last().unwrap();
    let mut table = settings;
    for name in tables {
        let name = if name.starts_with('"') { "public.orders" } else { name };
        let entry = table.entry(name).or_insert_with(|| toml::Table::new().into());
        table = entry.as_table_mut().unwrap();
    }
    match value {
        Some(value) => table.insert(name.clone(), value),
        None => table.remove(name),
    };
}

/// What the settings come to, if they are valid.
fn resolved(settings: &toml::Table) -> Option<String> {
    let settings: Settings = toml::Value::Table(settings.clone()).try_into().ok()?;
    settings.validate().ok()?;
    Some(format!("{:?}", Config::resolve(settings)))
}

#[test]
fn docs_settings_is_as_the_code() {
    let document = std::fs::read_to_string(PAGE).unwrap();
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (listed, after) = rest.split_once(END).unwrap();

    if std::env::var_os("RHEI_BLESS").is_some() {
        std::fs::write(PAGE, [before, BEGIN, &page(), END, after].concat()).unwrap();
        return;
    }
    assert!(listed == page(), "{PAGE} is not as the code: run with RHEI_BLESS=1");
}

#[test]
fn every_setting_says_what_it_means() {
    let found = settings();
    assert!(found.len() > 40, "only {} settings were found", found.len());

    for setting in found {
        let meaning = &setting.meaning;
        assert!(meaning.ends_with('.'), "{}: {meaning:?} is no sentence", setting.name());
        assert!(!setting.kind.is_empty(), "{} has no type", setting.name());
    }
}

/// Every key that has a value as its default is left out of the example with all keys switched on.
/// To write its default there must come to the same as to leave it out.
#[test]
fn the_defaults_that_are_documented_are_those_of_the_code() {
    let example = std::fs::read_to_string("rhei.toml.example").unwrap();
    let all: String = example
        .lines()
        .map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n")
        .collect();
    let mut base: toml::Table = toml::from_str(&all).unwrap();

    let found = settings();
    let with_values: Vec<&Setting> =
        found.iter().filter(|setting| setting.default_value().is_some()).collect();
    assert!(with_values.len() > 20, "only {} defaults are values", with_values.len());
    with_values.iter().for_each(|setting| put(&mut base, &setting.path, None));

    // A lake takes the place of the file, and nothing is published from it.
    let mut with_lake = base.clone();
    with_lake.remove("publish");
    with_lake.remove("serve");
    put(&mut with_lake, &["target".to_owned(), "path".to_owned()], None);
    let lake = Some("ducklake:lake.ducklake".into());
    put(&mut with_lake, &["target".to_owned(), "lake".to_owned()], lake);
    let of_lake = ["clean_after", "file_size", "keep_snapshots", "schema_prefix"];

    let others =
        ["7", "true", "\"7s\"", "\"7MB\"", "\"7%\"", "\"other\"", "[\"other\"]", "\"once\""]
            .map(|literal| toml::from_str::<toml::Table>(&format!("value = {literal}")).unwrap());

    for setting in with_values {
        let name = setting.name();
        let is_of_lake = setting.path.last().is_some_and(|key| of_lake.contains(&key.as_str()));
        let base = if is_of_lake { &with_lake } else { &base };
        let expected = resolved(base).unwrap();
        let with = |value: Option<toml::Value>| {
            let mut settings = base.clone();
            put(&mut settings, &setting.path, value);
            resolved(&settings)
        };

        let default = setting.default_value();
        assert_eq!(with(default).as_ref(), Some(&expected), "{name} has another default");

        let choices = setting.choices.iter().map(|(value, _)| value.trim_matches(['`', '"']));
        let choices = choices.map(|value| Some(value.to_owned().into()));
        let candidates = others.iter().map(|other| other.get("value").cloned()).chain(choices);
        let changes = candidates.filter_map(with).any(|text| text != expected);
        assert!(changes, "{name}: no other value changes anything, so its default is not tested");
    }
}
