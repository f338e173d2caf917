//! A real browser, driven over its own protocol (Chrome DevTools Protocol, by a pair of pipes: `--remote-debugging-pipe`).

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::wait::{until, within};

/// How long the browser may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser with one page. Ends with the value.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    commands: File,
    answers: Receiver<Value>,
    events: Arc<Mutex<Vec<Value>>>,
    session: Option<String>,
    next: u64,
    folder: TempDir,
}

/// Where pictures of the page are kept, to be looked at.
pub fn shots() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
    fs::create_dir_all(&folder).expect("a folder for pictures");
    folder
}

impl Browser {
    /// Starts one with an empty page.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name);
        let (commands, answers) = (path("commands"), path("answers"));
        let made = Command::new("mkfifo").args([&commands, &answers]).status().expect("mkfifo");
        assert!(made.success(), "mkfifo failed");
        // The descriptors 3 and 4 are the protocol's.
        let script = "exec 3<\"$1\" 4>\"$2\"; exec chromium --headless=new --remote-debugging-pipe --no-sandbox --disable-gpu \
                      --disable-dev-shm-usage --hide-scrollbars --no-first-run --disable-extensions --disable-background-networking \
                      --disable-component-update --user-data-dir=\"$3\" about:blank";
        let child = Command::new("sh")
            .args(["-c", script, "browser"])
            .args([&commands, &answers, &path("profile")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh");
        let commands = OpenOptions::new().write(true).open(commands).expect("a pipe");
        let answers = File::open(answers).expect("chromium: run `scripts/setup browser`");
        let events = Arc::new(Mutex::new(Vec::new()));
        let (sender, receiver) = channel();
        let told = Arc::clone(&events);
        std::thread::spawn(move || {
            for message in BufReader::new(answers).split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice::<Value>(&message) else { continue };
                if message.get("id").is_some() {
                    sender.send(message).ok();
                } else {
                    told.lock().expect("events").push(message);
                }
            }
        });
        let mut browser = Self { child, commands, answers: receiver, events, session: None, next: 0, folder };
        let target =
            browser.command("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached =
            browser.command("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.command(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Has the browser do something; what it answers.
    pub fn command(&mut self, method: &str, parameters: Value) -> Value {
        self.next += 1;
        let mut command = json!({ "id": self.next, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            command["sessionId"] = session.as_str().into();
        }
        let mut bytes = serde_json::to_vec(&command).expect("JSON");
        bytes.push(0);
        self.commands.write_all(&bytes).expect("the browser listens");
        loop {
            let answer =
                self.answers.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no answer to {method}"));
            if answer["id"] == self.next {
                assert!(answer.get("error").is_none(), "{method}: {}", answer["error"]);
                return answer["result"].clone();
            }
        }
    }

    /// The size of the window, and whether dark colours are wanted.
    pub fn look(&mut self, (width, height): (u32, u32), is_dark: bool) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.command("Emulation.setDeviceMetricsOverride", size);
        let theme = if is_dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
        self.command("Emulation.setEmulatedMedia", media);
    }

    /// Goes to an address.
    pub fn open(&mut self, url: &str) {
        self.command("Page.navigate", json!({ "url": url }));
    }

    /// The value of a script.
    pub fn run(&mut self, script: &str) -> Value {
        let answer = self.command(
            "Runtime.evaluate",
            json!({ "expression": script, "returnByValue": true, "awaitPromise": true }),
        );
        assert!(answer.get("exceptionDetails").is_none(), "{script}: {}", answer["exceptionDetails"]);
        answer["result"]["value"].clone()
    }

    /// Waits until a script's value is true.
    pub async fn until(&mut self, what: &str, script: &str) {
        // While a page is being loaded there may be nothing at all.
        let script = format!("(() => {{ try {{ return Boolean({script}) }} catch {{ return false }} }})()");
        let found = within(PATIENCE, async || (self.run(&script) == true).then_some(())).await;
        if found.is_none() {
            let text = self.run("document.body.innerText.slice(0, 4000)");
            panic!("{what}: never, of a page that says {text}; errors: {:?}", self.errors());
        }
    }

    /// Waits until the view has its data.
    pub async fn ready(&mut self) {
        self.until("the view is ready", "document.documentElement.dataset.ready === 'true'").await;
    }

    /// Clicks on the first element of a selector, as a mouse does.
    pub fn click(&mut self, selector: &str) {
        let (x, y) = self.middle_of(selector);
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({ "type": kind, "x": x, "y": y, "button": "left", "clickCount": 1 });
            self.command("Input.dispatchMouseEvent", event);
        }
    }

    /// Clicks on what saves a file; the file.
    pub async fn download(&mut self, selector: &str) -> Vec<u8> {
        let folder = self.folder.path().join("downloads");
        // Of the one before.
        fs::remove_dir_all(&folder).ok();
        fs::create_dir(&folder).expect("a folder for downloads");
        self.command(
            "Browser.setDownloadBehavior",
            json!({ "behavior": "allow", "downloadPath": folder.display().to_string() }),
        );
        self.click(selector);
        until("a file is saved", PATIENCE, async || {
            let mut files = fs::read_dir(&folder).expect("the folder").flatten();
            let file = files.find(|file| file.path().extension().is_some_and(|kind| kind != "crdownload"))?;
            let bytes = fs::read(file.path()).ok()?;
            (!bytes.is_empty()).then_some(bytes)
        })
        .await
    }

    /// Drags over an element, from one share of its width to another.
    pub fn drag(&mut self, selector: &str, from: f64, to: f64) {
        let place = self.place_of(selector);
        let number = |name: &str| place[name].as_f64().expect("a number");
        let y = number("y") + number("height") / 2.0;
        let x = |share: f64| number("x") + number("width") * share;
        let mouse = |browser: &mut Self, kind: &str, x: f64| {
            let event =
                json!({ "type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1 });
            browser.command("Input.dispatchMouseEvent", event);
        };
        mouse(self, "mouseMoved", x(from));
        mouse(self, "mousePressed", x(from));
        for step in 1..=8 {
            mouse(self, "mouseMoved", x(from + (to - from) * f64::from(step) / 8.0));
        }
        mouse(self, "mouseReleased", x(to));
    }

    /// Types a text where the focus is.
    pub fn write(&mut self, text: &str) {
        self.command("Input.insertText", json!({ "text": text }));
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str, code: u32) {
        for kind in ["rawKeyDown", "keyUp"] {
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            self.command("Input.dispatchKeyEvent", event);
        }
    }

    fn place_of(&mut self, selector: &str) -> Value {
        let found = self.run(&format!(
            "(() => {{ const found = document.querySelector({selector:?}); if (!found) return null;
              found.scrollIntoView({{ block: 'center' }});
              const {{ x, y, width, height }} = found.getBoundingClientRect(); return {{ x, y, width, height }} }})()"
        ));
        assert!(!found.is_null(), "nothing is {selector}");
        found
    }

    fn middle_of(&mut self, selector: &str) -> (f64, f64) {
        let place = self.place_of(selector);
        let number = |name: &str| place[name].as_f64().expect("a number");
        (number("x") + number("width") / 2.0, number("y") + number("height") / 2.0)
    }

    /// Keeps a picture of the page.
    pub fn shoot(&mut self, name: &str) {
        let picture = self.command("Page.captureScreenshot", json!({ "format": "png" }));
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(picture["data"].as_str().expect("a picture"));
        fs::write(shots().join(format!("{name}.png")), bytes.expect("base64")).expect("a file");
    }

    /// What the page has complained about.
    pub fn errors(&self) -> Vec<String> {
        let is_error = |event: &&Value| match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => event["params"]["type"] == "error",
            Some("Log.entryAdded") => event["params"]["entry"]["level"] == "error",
            _ => false,
        };
        self.events.lock().expect("events").iter().filter(is_error).map(ToString::to_string).collect()
    }

    /// The addresses that the page has asked.
    pub fn requests(&self) -> Vec<String> {
        let url = |event: &Value| {
            (event["method"] == "Network.requestWillBeSent")
                .then(|| event["params"]["request"]["url"].as_str().map(str::to_owned))?
        };
        self.events.lock().expect("events").iter().filter_map(url).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
