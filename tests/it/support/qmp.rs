//! A client of the control socket that sends what it is told, also what it should not.

use super::Failure;
use super::command::LIMIT;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// One connection.
pub(crate) struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that came between answers, oldest first.
    pub(crate) events: Vec<Value>,
}

impl Qmp {
    /// Connects, reads the greeting, and negotiates.
    pub(crate) fn connect(socket: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let lines = BufReader::new(stream.try_clone()?);
        let mut client = Self {
            stream,
            lines,
            events: Vec::new(),
        };
        let greeting = client.read()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("no greeting: {greeting}").into());
        }
        client.execute("qmp_capabilities")?;
        Ok(client)
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// The next message, answer or event.
    pub(crate) fn read(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err("the server closed the connection".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// The next answer; events are kept.
    pub(crate) fn answer(&mut self) -> Result<Value, Failure> {
        loop {
            let message = self.read()?;
            if message.get("event").is_none() {
                return Ok(message);
            }
            self.events.push(message);
        }
    }

    /// The next event of a name, or one that came already.
    pub(crate) fn event(&mut self, name: &str) -> Result<Value, Failure> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let message = self.read()?;
            self.events.push(message);
        }
    }

    /// What a command without arguments returns; an error if it is refused.
    pub(crate) fn execute(&mut self, command: &str) -> Result<Value, Failure> {
        self.send(format!("{{\"execute\": \"{command}\"}}\n").as_bytes())?;
        let mut answer = self.answer()?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(format!("{command}: {answer}").into()),
        }
    }
}
