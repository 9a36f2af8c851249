//! Bytes <-> QMP messages. Pure: no sockets, no state of a session.
//!
//! A client may send objects without a newline between them, several in a line, or one over many
//! packets, so [`Framer`] finds message ends by following the JSON structure byte by byte. It
//! notices a structural error at the byte that makes it and then looks for a place to go on, so
//! that a bad message costs its sender one error and nothing else.
//!
//! As QEMU does, input may delimit strings by apostrophes, which people like in shell scripts; the
//! framer hands such a string on with quotation marks. Output is ASCII: what is not is escaped.
//!
//! Recovery after a bad or oversized message ends at the first of: the bracket that closes what
//! was open; a `{` that starts a line; a newline, or a `{`, with nothing open; the byte 0xFF, which
//! no JSON contains and QMP clients send to resynchronise.
//!
//! Limits: a message has at most [`MESSAGE_BYTES_MAX`] bytes and [`DEPTH_MAX`] levels.

use std::fmt;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::error::CommandError;

/// The longest message accepted, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// The deepest nesting of objects and arrays accepted.
pub const DEPTH_MAX: usize = 64;

/// The recursion limit of `serde_json`'s parser.
const PARSER_DEPTH_MAX: usize = 128;
const _: () = assert!(DEPTH_MAX < PARSER_DEPTH_MAX);

/// What QMP clients send to make the other side forget a half-sent message.
const RESYNC_BYTE: u8 = 0xFF;

/// One result of [`Framer::next`].
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A complete object, its strings in quotation marks. Its brackets and separators are right; its
    /// scalars are not yet checked.
    Message(Vec<u8>),
    /// Input that cannot be a message; the framer goes on behind it by itself.
    Bad(CommandError),
}

/// A container that is open at the present byte.
#[derive(Debug, Clone, Copy)]
enum Container {
    Object,
    Array,
}

/// What the grammar allows next inside a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    KeyOrEnd,
    Key,
    Colon,
    Value,
    ValueOrEnd,
    CommaOrEnd,
}

/// Where the framer is.
#[derive(Debug)]
enum State {
    /// Between messages.
    Between,
    /// In a message, outside of strings and scalars.
    Inside(Expect),
    /// In a string of a message that ends at the next `quote`; `is_key` if a colon follows.
    InString {
        quote: u8,
        escaped: bool,
        is_key: bool,
    },
    /// In a number or a literal of a message.
    InScalar,
    /// Behind a bad byte; `depth` brackets are still open, and the string that ends at `quote`.
    Recovering {
        depth: usize,
        quote: Option<u8>,
        escaped: bool,
    },
}

/// Splits a byte stream into messages.
#[derive(Debug)]
pub struct Framer {
    state: State,
    /// The message so far. Empty unless in a message.
    buffer: Vec<u8>,
    /// The open containers of the message, outermost first.
    open: Vec<Container>,
    /// Only blanks since the last newline.
    at_line_start: bool,
}

impl Default for Framer {
    fn default() -> Self {
        Self {
            state: State::Between,
            buffer: Vec::new(),
            open: Vec::new(),
            at_line_start: true,
        }
    }
}

/// The outcome of one byte inside a message.
type Step = Result<Option<Frame>, CommandError>;

impl Framer {
    /// Takes bytes from the front of `input` up to the end of the next frame. Returns how many were
    /// taken, and the frame if there was one; all of `input` is taken if there was none.
    pub fn next(&mut self, input: &[u8]) -> (usize, Option<Frame>) {
        for (index, &byte) in input.iter().enumerate() {
            let frame = self.push(byte);
            self.at_line_start = match byte {
                b'\n' => true,
                b' ' | b'\t' | b'\r' => self.at_line_start,
                _ => false,
            };
            if frame.is_some() {
                return (index + 1, frame);
            }
        }
        (input.len(), None)
    }

    fn push(&mut self, byte: u8) -> Option<Frame> {
        if byte == RESYNC_BYTE {
            let was_recovering = matches!(self.state, State::Recovering { .. });
            self.reset();
            return (!was_recovering)
                .then(|| Frame::Bad(CommandError::generic("JSON parse error, stray '\u{fffd}'")));
        }
        match self.state {
            State::Between => self.push_between(byte),
            State::Recovering { .. } => {
                self.push_recovering(byte);
                None
            }
            _ => {
                if self.buffer.len() >= MESSAGE_BYTES_MAX {
                    return Some(self.recover(
                        byte,
                        CommandError::generic(format!(
                            "message is longer than {MESSAGE_BYTES_MAX} bytes"
                        )),
                    ));
                }
                match self.push_inside(byte) {
                    Ok(frame) => frame,
                    Err(error) => Some(self.recover(byte, error)),
                }
            }
        }
    }

    fn reset(&mut self) {
        self.state = State::Between;
        self.buffer = Vec::new();
        self.open.clear();
    }

    fn push_between(&mut self, byte: u8) -> Option<Frame> {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => None,
            b'{' => {
                self.buffer.push(byte);
                self.open.push(Container::Object);
                self.state = State::Inside(Expect::KeyOrEnd);
                None
            }
            _ => Some(self.recover(
                byte,
                CommandError::generic("QMP input must be a JSON object"),
            )),
        }
    }

    /// Gives up the present message because of `byte`, and starts to look for the next one there.
    fn recover(&mut self, byte: u8, error: CommandError) -> Frame {
        let (quote, escaped) = match self.state {
            State::InString { quote, escaped, .. } => (Some(quote), escaped),
            _ => (None, false),
        };
        let depth = self.open.len();
        self.reset();
        self.state = State::Recovering {
            depth,
            quote,
            escaped,
        };
        self.push_recovering(byte);
        Frame::Bad(error)
    }

    fn push_recovering(&mut self, byte: u8) {
        let State::Recovering {
            depth,
            quote,
            escaped,
        } = self.state
        else {
            return;
        };
        let outside = |depth| State::Recovering {
            depth,
            quote: None,
            escaped: false,
        };
        self.state = match byte {
            // A raw newline ends a string too: no JSON string contains one.
            b'\n' if depth == 0 => State::Between,
            b'\n' => outside(depth),
            _ if quote.is_some() => State::Recovering {
                depth,
                quote: quote.filter(|quote| byte != *quote || escaped),
                escaped: byte == b'\\' && !escaped,
            },
            b'"' | b'\'' => State::Recovering {
                depth,
                quote: Some(byte),
                escaped: false,
            },
            b'{' if depth == 0 || self.at_line_start => {
                self.state = State::Between;
                // A `{` between messages only starts one.
                let _ = self.push_between(byte);
                return;
            }
            b'{' | b'[' => outside(depth.saturating_add(1)),
            b'}' | b']' if depth == 1 => State::Between,
            b'}' | b']' => outside(depth.saturating_sub(1)),
            _ => outside(depth),
        };
    }

    fn push_inside(&mut self, byte: u8) -> Step {
        match self.state {
            State::InString {
                quote,
                escaped,
                is_key,
            } => {
                if byte < b' ' {
                    return Err(CommandError::generic(
                        "JSON parse error, control character in a string",
                    ));
                }
                if byte == quote && !escaped {
                    self.buffer.push(b'"');
                    self.state = State::Inside(if is_key {
                        Expect::Colon
                    } else {
                        Expect::CommaOrEnd
                    });
                } else {
                    self.push_in_string(byte, escaped);
                    self.state = State::InString {
                        quote,
                        escaped: byte == b'\\' && !escaped,
                        is_key,
                    };
                }
                Ok(None)
            }
            State::InScalar if is_scalar_byte(byte) => {
                self.buffer.push(byte);
                Ok(None)
            }
            State::InScalar => {
                self.state = State::Inside(Expect::CommaOrEnd);
                self.push_structure(byte, Expect::CommaOrEnd)
            }
            State::Inside(expect) => self.push_structure(byte, expect),
            State::Between | State::Recovering { .. } => Ok(None),
        }
    }

    /// A byte of a string, which JSON proper has in quotation marks: there an apostrophe needs no
    /// escape, and a quotation mark always does.
    fn push_in_string(&mut self, byte: u8, escaped: bool) {
        match (byte, escaped) {
            (b'\'', true) => {
                self.buffer.pop();
            }
            (b'"', false) => self.buffer.push(b'\\'),
            _ => {}
        }
        self.buffer.push(byte);
    }

    fn push_structure(&mut self, byte: u8, expect: Expect) -> Step {
        let value_allowed = matches!(expect, Expect::Value | Expect::ValueOrEnd);
        self.buffer.push(if byte == b'\'' { b'"' } else { byte });
        match (byte, expect) {
            (b' ' | b'\t' | b'\r' | b'\n', _) => {}
            (b'"' | b'\'', Expect::Key | Expect::KeyOrEnd) => {
                self.state = State::InString {
                    quote: byte,
                    escaped: false,
                    is_key: true,
                };
            }
            (b'"' | b'\'', _) if value_allowed => {
                self.state = State::InString {
                    quote: byte,
                    escaped: false,
                    is_key: false,
                };
            }
            (b'{', _) if value_allowed => self.open(Container::Object, Expect::KeyOrEnd)?,
            (b'[', _) if value_allowed => self.open(Container::Array, Expect::ValueOrEnd)?,
            (_, _) if value_allowed && is_scalar_byte(byte) => self.state = State::InScalar,
            (b':', Expect::Colon) => self.state = State::Inside(Expect::Value),
            (b',', Expect::CommaOrEnd) => {
                self.state = State::Inside(match self.open.last() {
                    Some(Container::Object) => Expect::Key,
                    Some(Container::Array) | None => Expect::Value,
                });
            }
            (b'}', Expect::KeyOrEnd | Expect::CommaOrEnd)
                if matches!(self.open.last(), Some(Container::Object)) =>
            {
                return Ok(self.close());
            }
            (b']', Expect::ValueOrEnd | Expect::CommaOrEnd)
                if matches!(self.open.last(), Some(Container::Array)) =>
            {
                return Ok(self.close());
            }
            _ => {
                return Err(CommandError::generic(format!(
                    "JSON parse error, {}",
                    expect.told()
                )));
            }
        }
        Ok(None)
    }

    fn open(&mut self, container: Container, expect: Expect) -> Result<(), CommandError> {
        if self.open.len() == DEPTH_MAX {
            return Err(CommandError::generic("JSON nesting depth limit exceeded"));
        }
        self.open.push(container);
        self.state = State::Inside(expect);
        Ok(())
    }

    fn close(&mut self) -> Option<Frame> {
        self.open.pop();
        if self.open.is_empty() {
            self.state = State::Between;
            return Some(Frame::Message(std::mem::take(&mut self.buffer)));
        }
        self.state = State::Inside(Expect::CommaOrEnd);
        None
    }
}

impl Expect {
    fn told(self) -> &'static str {
        match self {
            Self::KeyOrEnd => "expecting a string or '}'",
            Self::Key => "expecting a string",
            Self::Colon => "missing : in object pair",
            Self::Value | Self::ValueOrEnd => "expecting value",
            Self::CommaOrEnd => "expecting ',' or a closing bracket",
        }
    }
}

/// A byte of a number or literal. Whether they spell one is for the parser to say.
fn is_scalar_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.')
}

/// A command as a client sent it.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// The command's name.
    pub command: String,
    /// Its arguments, empty if there were none.
    pub arguments: Map<String, Value>,
    /// To be repeated in the reply.
    pub id: Option<Value>,
}

/// A message that is no command, and the `id` it carried all the same.
#[derive(Debug, PartialEq)]
pub struct BadRequest {
    /// To be repeated in the reply.
    pub id: Option<Value>,
    /// What is wrong.
    pub error: CommandError,
}

/// Parses one framed message.
///
/// # Errors
///
/// [`BadRequest`] if it is not JSON, or not of the form of a command.
pub fn parse_request(message: &[u8]) -> Result<Request, BadRequest> {
    let parsed = serde_json::from_slice(message).map(|StrictValue(value)| value);
    let mut members = match parsed {
        Ok(Value::Object(members)) => members,
        Ok(_) => {
            let error = CommandError::generic("QMP input must be a JSON object");
            return Err(BadRequest { id: None, error });
        }
        Err(parse_error) => {
            let error = CommandError::generic(format!("JSON parse error, {parse_error}"));
            return Err(BadRequest { id: None, error });
        }
    };
    let id = members.shift_remove("id");
    match parse_members(members) {
        Ok((command, arguments)) => Ok(Request {
            command,
            arguments,
            id,
        }),
        Err(desc) => Err(BadRequest {
            id,
            error: CommandError::generic(desc),
        }),
    }
}

/// A JSON value none of whose objects names a member twice. Which of two was meant nobody knows, and
/// another reader of the same message may take the other.
struct StrictValue(Value);

impl<'de> Deserialize<'de> for StrictValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(StrictValue(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((name, StrictValue(value))) = entries.next_entry::<String, _>()? {
            if members.insert(name, value).is_some() {
                return Err(de::Error::custom("duplicate key"));
            }
        }
        Ok(members.into())
    }
}

fn parse_members(members: Map<String, Value>) -> Result<(String, Map<String, Value>), String> {
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute", Value::String(name)) => command = Some(name),
            ("execute", _) => return Err("QMP input member 'execute' must be a string".into()),
            ("arguments", Value::Object(members)) => arguments = members,
            ("arguments", _) => {
                return Err("QMP input member 'arguments' must be an object".into());
            }
            // `exec-oob` comes here as well: the greeting does not offer it.
            _ => return Err(format!("QMP input member '{name}' is unexpected")),
        }
    }
    let command = command.ok_or("QMP input lacks member 'execute'")?;
    Ok((command, arguments))
}

/// One line of output: `value` and CR LF, as QEMU ends its messages.
pub(super) fn encode_line(value: &impl Serialize) -> Vec<u8> {
    // Our own types: string keys and no failing `Serialize`, so that this cannot fail.
    let text = serde_json::to_string(value).unwrap_or_default();
    let mut line = Vec::with_capacity(text.len() + 2);
    for character in text.chars() {
        // QMP promises ASCII. Outside of strings there is nothing else in JSON.
        match u8::try_from(character) {
            Ok(byte @ b' '..=b'~') => line.push(byte),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    line.extend_from_slice(format!("\\u{unit:04x}").as_bytes());
                }
            }
        }
    }
    line.extend_from_slice(b"\r\n");
    line
}

/// The reply to a command.
pub fn encode_reply(id: Option<&Value>, result: &Result<Value, CommandError>) -> Vec<u8> {
    let mut reply = Map::new();
    match result {
        Ok(value) => reply.insert("return".into(), value.clone()),
        Err(error) => reply.insert("error".into(), json!(error)),
    };
    if let Some(id) = id {
        reply.insert("id".into(), id.clone());
    }
    encode_line(&reply)
}

/// The first message on every connection. No capabilities are offered: commands run in order.
pub fn encode_greeting(version: &Value) -> Vec<u8> {
    encode_line(&json!({ "QMP": { "version": version, "capabilities": [] } }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that comes out of a fresh framer for `input`, messages as text and errors as
    /// `!description`.
    fn frames(input: &[u8]) -> Vec<String> {
        collect(&mut Framer::default(), input)
    }

    fn collect(framer: &mut Framer, mut input: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        while !input.is_empty() {
            let (taken, frame) = framer.next(input);
            input = &input[taken..];
            match frame {
                Some(Frame::Message(message)) => {
                    found.push(String::from_utf8_lossy(&message).into_owned());
                }
                Some(Frame::Bad(error)) => found.push(format!("!{}", error.desc)),
                None => {}
            }
        }
        found
    }

    const NOT_AN_OBJECT: &str = "!QMP input must be a JSON object";
    const NO_SEPARATOR: &str = "!JSON parse error, expecting ',' or a closing bracket";

    #[test]
    fn objects_need_no_newline_between_them() {
        assert_eq!(
            frames(br#"{"a":1}{"b":[2,{}]} {"c":"}"}"#),
            [r#"{"a":1}"#, r#"{"b":[2,{}]}"#, r#"{"c":"}"}"#]
        );
    }

    #[test]
    fn an_object_may_come_byte_by_byte() {
        let mut framer = Framer::default();
        let input = br#"{ "a" : "x\"\\y" , "b" : [ ] , "c" : -1.5e+3 }"#;
        let found: Vec<_> = input
            .chunks(1)
            .flat_map(|byte| collect(&mut framer, byte))
            .collect();
        assert_eq!(found, [String::from_utf8_lossy(input)]);
    }

    #[test]
    fn an_object_may_span_lines() {
        assert_eq!(
            frames(b"\n{\n  \"a\":\n{\r\n}\n}\n"),
            ["{\n  \"a\":\n{\r\n}\n}"]
        );
    }

    /// QEMU's extension of JSON, which its users' shell scripts rely on.
    #[test]
    fn strings_may_stand_between_apostrophes() {
        assert_eq!(
            frames(br#"{'a':['b','}'], "c'":"it's", 'd':'say "x\"\\"'}{'e':'it\'s',"f":"\'"}"#),
            [
                r#"{"a":["b","}"], "c'":"it's", "d":"say \"x\"\\\""}"#,
                r#"{"e":"it's","f":"'"}"#
            ]
        );
    }

    #[test]
    fn a_bad_object_ends_behind_its_strings_between_apostrophes() {
        assert_eq!(
            frames(br#"{'a' '}' "}" ['"}]\''] }{}"#),
            ["!JSON parse error, missing : in object pair", "{}"]
        );
    }

    /// A quotation mark between apostrophes takes two bytes in the message that is handed on.
    #[test]
    fn what_grows_when_it_is_handed_on_is_limited_all_the_same() {
        let mut input = b"{'a':'".to_vec();
        input.resize(MESSAGE_BYTES_MAX - 10, b'"');
        input.extend_from_slice(b"'}\n{}");
        let too_long = format!("!message is longer than {MESSAGE_BYTES_MAX} bytes");
        assert_eq!(frames(&input), [too_long.as_str(), "{}"]);
    }

    #[test]
    fn output_is_ascii_whatever_it_says() {
        let id = json!("a\u{e9}\u{1f600}\u{7f}\u{9b}\n");
        let line = encode_reply(Some(&id), &Ok(json!({})));
        let text = String::from_utf8(line).unwrap();
        assert_eq!(
            text,
            "{\"return\":{},\"id\":\"a\\u00e9\\ud83d\\ude00\\u007f\\u009b\\n\"}\r\n"
        );
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["id"], id);
    }

    #[test]
    fn a_line_of_garbage_is_one_error() {
        assert_eq!(
            frames(b"this is, not ] json \"at all\n{}"),
            [NOT_AN_OBJECT, "{}"]
        );
    }

    #[test]
    fn values_that_are_not_objects_are_refused_without_a_newline() {
        assert_eq!(frames(b"[1]{}"), [NOT_AN_OBJECT, "{}"]);
        assert_eq!(frames(b"1 {}"), [NOT_AN_OBJECT, "{}"]);
        assert_eq!(frames(b"\"{\" {}"), [NOT_AN_OBJECT, "{}"]);
    }

    #[test]
    fn a_bad_object_ends_at_its_bracket() {
        assert_eq!(
            frames(br#"{bad {"}}" [} json}]}{}"#),
            [
                "!JSON parse error, expecting a string or '}'",
                "!QMP input must be a JSON object",
                "{}"
            ]
        );
        assert_eq!(
            frames(br#"{"a":1,}{}"#),
            ["!JSON parse error, expecting a string", "{}"]
        );
        assert_eq!(
            frames(br#"{"a"}{}"#),
            ["!JSON parse error, missing : in object pair", "{}"]
        );
        assert_eq!(
            frames(br#"{"a":}{}"#),
            ["!JSON parse error, expecting value", "{}"]
        );
        assert_eq!(frames(br#"{"a":1 @ "}"}{}"#), [NO_SEPARATOR, "{}"]);
        assert_eq!(frames(br#"{"a":1 2}{}"#), [NO_SEPARATOR, "{}"]);
    }

    #[test]
    fn a_cut_line_is_noticed_at_the_next_one() {
        assert_eq!(
            frames(b"{\"a\": 1\n{\"b\": 2}\n"),
            [NO_SEPARATOR, "{\"b\": 2}"]
        );
    }

    #[test]
    fn an_open_string_ends_at_the_newline() {
        assert_eq!(
            frames(b"{\"a\": \"open\n{}"),
            ["!JSON parse error, control character in a string", "{}"]
        );
    }

    #[test]
    fn mismatched_brackets_are_refused() {
        assert_eq!(
            frames(b"{\"a\":[}\n{}"),
            ["!JSON parse error, expecting value", "{}"]
        );
    }

    #[test]
    fn the_resync_byte_forgets_a_half_sent_message() {
        let stray = "!JSON parse error, stray '\u{fffd}'";
        assert_eq!(frames(b"{\"a\": \"\xff{}"), [stray, "{}"]);
        assert_eq!(frames(b"\xff{}"), [stray, "{}"]);
        assert_eq!(frames(b"junk \xff{}"), [NOT_AN_OBJECT, "{}"]);
    }

    /// An object of exactly `length` bytes.
    fn object_of(length: usize) -> Vec<u8> {
        let mut object = br#"{"a":""#.to_vec();
        object.resize(length - 2, b'x');
        object.extend_from_slice(b"\"}");
        object
    }

    #[test]
    fn the_longest_message_is_accepted() {
        let mut framer = Framer::default();
        let (taken, frame) = framer.next(&object_of(MESSAGE_BYTES_MAX));
        assert_eq!(taken, MESSAGE_BYTES_MAX);
        assert_eq!(frame, Some(Frame::Message(object_of(MESSAGE_BYTES_MAX))));
    }

    #[test]
    fn one_byte_more_is_refused_and_forgotten() {
        let mut input = object_of(MESSAGE_BYTES_MAX + 1);
        input.extend_from_slice(b"{}");
        assert_eq!(
            frames(&input),
            ["!message is longer than 65536 bytes", "{}"]
        );
    }

    #[test]
    fn an_endless_message_takes_no_memory() {
        let mut framer = Framer::default();
        let mut errors = collect(&mut framer, br#"{"a":""#);
        for _ in 0..64 {
            errors.extend(collect(&mut framer, &[b'x'; MESSAGE_BYTES_MAX]));
        }
        assert_eq!(errors, ["!message is longer than 65536 bytes"]);
        assert_eq!(framer.buffer.capacity(), 0);
        assert_eq!(collect(&mut framer, b"\n{}"), ["{}"]);
    }

    fn nested(depth: usize) -> Vec<u8> {
        let lists = depth - 1;
        [r#"{"a":"#, &"[".repeat(lists), &"]".repeat(lists), "}"]
            .concat()
            .into_bytes()
    }

    #[test]
    fn nesting_is_limited() {
        let deepest = String::from_utf8(nested(DEPTH_MAX)).unwrap();
        assert_eq!(frames(deepest.as_bytes()), [deepest]);
        let mut deeper = nested(DEPTH_MAX + 1);
        deeper.extend_from_slice(b"{}");
        assert_eq!(
            frames(&deeper),
            ["!JSON nesting depth limit exceeded", "{}"]
        );
    }

    #[test]
    fn what_nesting_the_framer_passes_the_parser_takes() {
        let error = parse_request(&nested(DEPTH_MAX)).unwrap_err().error;
        assert_eq!(error.desc, "QMP input member 'a' is unexpected");
    }

    /// Whatever structure the framer lets through, the parser takes. The only scalars here are
    /// decimal numbers, so that escapes in strings are all that is left to be wrong.
    #[test]
    fn what_structure_the_framer_passes_the_parser_takes() {
        let mut random = fastrand::Rng::with_seed(0x716d_7031);
        let alphabet = br#"{}[]",:\ 1"#;
        let mut message_count = 0;
        for _ in 0..200_000 {
            let mut input = b"{".to_vec();
            let length = random.usize(1..12);
            input.extend((0..length).map(|_| alphabet[random.usize(..alphabet.len())]));
            input.extend_from_slice(b"}\n");
            let (_, frame) = Framer::default().next(&input);
            let Some(Frame::Message(message)) = frame else {
                continue;
            };
            message_count += 1;
            if let Err(error) = serde_json::from_slice::<Value>(&message) {
                let text = String::from_utf8_lossy(&message);
                assert!(error.to_string().contains("escape"), "{text}: {error}");
            }
        }
        assert!(message_count > 100, "{message_count}");
    }

    fn refusal(message: &str) -> (Option<Value>, String) {
        let bad = parse_request(message.as_bytes()).unwrap_err();
        (bad.id, bad.error.desc)
    }

    #[test]
    fn a_request_has_a_name_arguments_and_an_id() {
        let message = br#"{"execute":"query-block","arguments":{"a":[1]},"id":{"x":null}}"#;
        let request = parse_request(message).unwrap();
        assert_eq!(request.command, "query-block");
        assert_eq!(request.arguments, *json!({ "a": [1] }).as_object().unwrap());
        assert_eq!(request.id, Some(json!({ "x": null })));
    }

    #[test]
    fn an_id_of_null_is_an_id() {
        assert_eq!(
            parse_request(br#"{"execute":"x","id":null}"#).unwrap().id,
            Some(Value::Null)
        );
        assert_eq!(parse_request(br#"{"execute":"x"}"#).unwrap().id, None);
    }

    #[test]
    fn requests_of_the_wrong_form_are_refused_in_qemus_words() {
        let cases = [
            (r#"{"id":1}"#, "QMP input lacks member 'execute'"),
            (
                r#"{"execute":1,"id":1}"#,
                "QMP input member 'execute' must be a string",
            ),
            (
                r#"{"execute":"x","arguments":[],"id":1}"#,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"execute":"x","foo":1,"id":1}"#,
                "QMP input member 'foo' is unexpected",
            ),
            (
                r#"{"exec-oob":"x","id":1}"#,
                "QMP input member 'exec-oob' is unexpected",
            ),
        ];
        let expected = cases.map(|(_, desc)| (Some(json!(1)), desc.to_owned()));
        assert_eq!(cases.map(|(message, _)| refusal(message)), expected);
    }

    /// Of two members of one name the last was taken, silently.
    #[test]
    fn a_member_that_is_there_twice_is_refused() {
        for message in [
            r#"{"execute":"x","execute":"y"}"#,
            r#"{"execute":"x","id":1,"id":1}"#,
            r#"{"execute":"x","arguments":{"a":[{"b":1,"b":2}]}}"#,
        ] {
            let (id, desc) = refusal(message);
            assert_eq!(id, None);
            assert!(
                desc.starts_with("JSON parse error, duplicate key"),
                "{desc}"
            );
        }
    }

    #[test]
    fn bad_scalars_are_refused() {
        assert!(
            refusal(r#"{"execute":nul}"#)
                .1
                .starts_with("JSON parse error, ")
        );
        assert!(
            refusal(r#"{"execute":"x","id":01}"#)
                .1
                .starts_with("JSON parse error, ")
        );
        assert!(
            refusal(r#"{"execute":"x","id":1e999}"#)
                .1
                .starts_with("JSON parse error, ")
        );
        assert!(
            refusal(r#"{"execute":"\ud800"}"#)
                .1
                .starts_with("JSON parse error, ")
        );
    }

    #[test]
    fn bytes_that_are_not_utf8_are_refused() {
        let bad = parse_request(b"{\"execute\":\"\xc0\"}").unwrap_err();
        assert!(
            bad.error.desc.starts_with("JSON parse error, "),
            "{}",
            bad.error
        );
    }
}
