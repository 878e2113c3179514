//! Whoever reads along has all of an answer before its result, however its call ended.

use crate::support::{Spec, World, ending, on_text, pass, script};
use forebay_operator::{Addressed, Context, Event, Failure, Host, Opened, Port, Step};
use forebay_runtime::host::memory::MemoryLog;
use forebay_schemas::{DecodeError, Delta, Generated, Hop, Identity, Request, RequestId};
use futures::future::BoxFuture;
use std::{
    future::pending,
    sync::{Arc, Mutex},
};

/// Writes three tokens at once, and ends as its record says.
struct Writes;

impl Step for Writes {
    fn operator(&self) -> &'static str {
        "writes"
    }
    fn hop(&self) -> Option<Hop> {
        None
    }
    fn input(&self) -> &'static str {
        "Text"
    }
    fn is_job(&self) -> bool {
        true
    }
    fn ports(&self) -> &'static [Port] {
        &[Port { name: "out", record: "Text" }]
    }
    fn open(&self, _: Option<&str>, body: Option<&[u8]>) -> Result<Box<dyn Opened + '_>, DecodeError> {
        Ok(Box::new(Told(String::from_utf8(body.unwrap().to_vec()).unwrap())))
    }
}

struct Told(String);

impl Opened for Told {
    fn identity(&self) -> Identity {
        let id = RequestId::try_from(self.0.clone()).ok();
        let deadline_ms = (self.0 == "late").then_some(100);
        Identity { id, deadline_ms, stream: true, ..Identity::default() }
    }
    fn request(&self) -> Option<&Request> {
        None
    }
    fn run<'a>(self: Box<Self>, cx: &'a Context) -> BoxFuture<'a, Result<Vec<Addressed>, Failure>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            ["so ", "far ", "so good"].into_iter().for_each(|token| cx.delta(0, token));
            match self.0.as_str() {
                "good" => Ok(vec![on_text("good")]),
                "cut" => Err(Failure::rejected("model_cut", "the answer was cut").with_partial(Some(read()))),
                "bug" => panic!("a bug"),
                _ => tokio::select! {
                    stop = cx.cancelled() => Err(stop.into()),
                    () = pending() => Ok(Vec::new()),
                },
            }
        })
    }
}

fn read() -> Generated {
    Generated {
        text: "so far so good".to_owned(),
        citations: Vec::new(),
        model: "m".to_owned(),
        provider: "told".to_owned(),
        usage: None,
        cost_nano_usd: None,
        finish_reason: None,
        ttft_us: Some(1),
        is_fallback: false,
        tier: None,
    }
}

/// Reads along, and looks at what of the request was written by then.
struct Reader(Arc<MemoryLog>, Mutex<Vec<String>>);

impl Host for Reader {
    fn delta(&self, _: &str, Delta { attempt, seq, text, .. }: Delta) {
        let written = ["out", "endings"].map(|topic| self.0.read(topic).len());
        self.1.lock().unwrap().push(format!("{attempt}.{seq} {text}, {written:?} written"));
    }
    fn observe(&self, _: &str, _: &Event) {}
}

async fn check(body: &str, times: usize, expected: &str) {
    let world = World::new();
    let reader = Arc::new(Reader(Arc::clone(&world.log), Mutex::default()));
    let unused = script(|_| async { Ok(Vec::new()) });
    let spec = Spec { step: Some(Arc::new(Writes)), host: Some(reader.clone()), ..Spec::new(unused) };
    let member = world.join(&spec);
    world.write("requests", None, body);
    pass(1).await;
    world.cancel("taken-back").await;
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.told(), expected);
    let answers: Vec<_> =
        world.log.read("endings").iter().filter_map(|message| ending(message).answer).collect();
    assert_eq!(
        answers,
        if body == "cut" { vec![read()] } else { Vec::new() },
        "what was read is in the ending"
    );
    let pieces = ["0.0 so , [0, 0] written", "0.1 far so good, [0, 0] written"];
    assert_eq!(*reader.1.lock().unwrap(), pieces.repeat(times), "{body}");
}

#[tokio::test(start_paused = true)]
async fn the_last_piece_is_sent_before_what_became_of_the_request() {
    check("good", 1, "out good").await;
    check("cut", 1, "dead rejected model_cut tries=1; failed model_cut").await;
    check("late", 1, "expired deadline").await;
    check("taken-back", 1, "cancelled cancelled").await;
    check("bug", 2, "dead panicked panicked tries=2; failed panicked").await;
}
