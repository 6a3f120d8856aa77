//! Conversations as text: a model's chat template (Jinja), rendered by the `minijinja` crate.
//!
//! Templates are written for Hugging Face transformers, whose environment this module imitates: blocks take the line
//! break after them and the spaces before them, methods of Python's strings, lists and dictionaries exist, and so do
//! `raise_exception`, `strftime_now` and a `tojson` that escapes nothing.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind as JinjaKind, context};
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::model::ModelConfig;
use super::tokenizer::Tokenizer;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Message {
    /// Who speaks; templates know `system`, `user` and `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A chat template, ready to render.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos", &self.bos).field("eos", &self.eos).finish_non_exhaustive()
    }
}

type JinjaResult<T> = std::result::Result<T, minijinja::Error>;

const NAME: &str = "chat template";

impl ChatTemplate {
    /// The template of a model. A model without one is an error.
    pub fn of_model(config: &ModelConfig, tokenizer: &Tokenizer) -> Result<Self> {
        let Some(source) = &config.chat_template else {
            return Err(Error::unsupported("a conversation with a model that has no chat template"));
        };
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        Self::new(source, name(config.bos), name(config.eos.first().copied()))
    }

    /// Reads a template. `bos` and `eos` are the texts of the tokens that begin and end a text, which templates write out.
    pub fn new(source: &str, bos: impl Into<String>, eos: impl Into<String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::malformed(sentence(&e)))?);
        // A template comes from a file that is not trusted: this bounds the steps it takes and the bytes it makes.
        environment.set_fuel(Some(5_000_000));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> JinjaResult<Value> {
            Err(minijinja::Error::new(JinjaKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment.add_filter("tojson", to_json);
        // The tags that mark an assistant's words for training have no effect on the text.
        let source = without_generation_tags(source);
        environment.add_template_owned(NAME, source).map_err(|e| Error::malformed(sentence(&e)))?;
        Ok(Self { environment: Arc::new(environment), bos: bos.into(), eos: eos.into() })
    }

    /// The text of a conversation, with the beginning of the assistant's answer. Tokens that the model expects at the start
    /// are part of the text, so that it is encoded without adding any.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let values = context! {
            messages => Serde(messages),
            add_generation_prompt => true,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let template = self.environment.get_template(NAME);
        template.and_then(|t| t.render(values)).map_err(|e| Error::malformed(sentence(&e)))
    }
}

/// Jinja's errors span lines when printed; a sentence does not.
fn sentence(error: &minijinja::Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("the chat template, line {line}: {detail}"),
        None => format!("the chat template: {detail}"),
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, with or without dashes, by tags without effect.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|n| start + n + 2) else { break };
        let tag = &rest[start..end];
        let word = tag[2..tag.len() - 2].trim_matches('-').trim();
        out += &rest[..start];
        match word {
            "generation" => out += &tag.replace("generation", "if true"),
            "endgeneration" => out += &tag.replace("endgeneration", "endif"),
            _ => out += tag,
        }
        rest = &rest[end..];
    }
    out + rest
}

/// Like Python's `json.dumps(value, ensure_ascii=False)`.
fn to_json(value: Value, options: Kwargs) -> JinjaResult<String> {
    let wrong = |e: serde_json::Error| minijinja::Error::new(JinjaKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(wrong)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(wrong)?,
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// Python's separators: `", "` and `": "`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970, UTC.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// Python's `strftime` for the fields of a date and a time that templates use.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Days to a date in the Gregorian calendar, counted from the first of March of the year 0, in eras of 400 years.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (name, weekday) = (MONTHS[(month - 1) as usize], DAYS[(days % 7) as usize]);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &format!("{year:04}"),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('e') => out += &format!("{day:2}"),
            Some('B') => out += name,
            Some('b' | 'h') => out += &name[..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('H') => out += &format!("{:02}", second / 3600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('F') => out += &format!("{year:04}-{month:02}-{day:02}"),
            Some('T') => out += &format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(messages)
    }

    #[test]
    fn a_usual_template() {
        let source = "{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
        let turns = [Message::new("user", " Hello "), Message::new("assistant", "Hi")];
        assert_eq!(
            render(source, &turns).unwrap(),
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n\
             <|im_start|>assistant\n"
        );
    }

    #[test]
    fn the_helpers_of_templates() {
        let turns = [Message::new("user", "a</think>b"), Message::new("assistant", "c")];
        let cases = [
            ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
            ("{{ messages[0].content.split('</think>')[-1].strip().upper() }}", "B"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{{ messages[0] | tojson }}", "{\"role\": \"user\", \"content\": \"a</think>b\"}"),
            ("{{ [1, 2] | tojson(indent=2) }}", "[\n  1,\n  2\n]"),
            ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
            ("{% generation %}x{% endgeneration %}{%- generation -%} y {%- endgeneration -%}", "xy"),
            ("{% if tools is defined and tools %}t{% else %}none{% endif %}", "none"),
            ("{{ messages[1:][0]['content'] }}", "c"),
            ("{% if x is not defined %}\n    y\n{% endif %}\nz", "    y\nz"),
        ];
        for (source, want) in cases {
            assert_eq!(render(source, &turns).unwrap(), want, "{source}");
        }
        let error = render("{{ raise_exception('Roles must alternate') }}", &turns).unwrap_err().to_string();
        assert!(error.contains("line 1: Roles must alternate"), "{error}");
        assert!(render("{% if %}", &turns).is_err());
        // A loop without end, as far as a person is concerned.
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(render(endless, &turns).is_err());
        let doubling =
            "{% set ns = namespace(x='a') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        assert!(render(doubling, &turns).is_err());
    }

    #[test]
    fn dates() {
        assert_eq!(strftime("%d %b %Y, %A %B %e %H:%M:%S", 0), "01 Jan 1970, Thursday January  1 00:00:00");
        assert_eq!(strftime("%F %T %a%%", 951_782_399), "2000-02-28 23:59:59 Mon%");
        assert_eq!(strftime("%F", 951_782_400), "2000-02-29");
        assert_eq!(strftime("%F %y", 4_102_444_799), "2099-12-31 99");
    }
}
