//! The side that offers memory, and the set-up that both sides speak: a JSON line each way.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use postcopy_transport::{AnyLane, Exporter, HostMemory, Importer, LaneClass, RemoteRegion, Transport};
use serde::{Deserialize, Serialize};
use serde_json::{from_str, to_string};

use crate::args::{DeviceArgs, REGION_BYTES, ServeArgs};
use crate::pattern;

/// Version of the set-up lines.
const VERSION: u32 = 1;
/// Longest line that a peer may send.
const MAX_LINE: u64 = 16 << 10;
/// How long either side waits for the other during set-up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a connection to `serve` begins with.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Hello {
    /// I want to read, over this transport. The connection stays open as long as I do.
    Read { version: u32, transport: String, request: Vec<u8> },
    /// This connection is the lane with that name.
    Lane { name: String },
}

/// The answer to a reader.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Granted { region: Vec<u8>, grant: Vec<u8>, lane: String },
    Refused(String),
}

fn send(stream: &mut TcpStream, line: &impl Serialize) -> anyhow::Result<()> {
    let mut text = to_string(line)?;
    text.push('\n');
    Ok(stream.write_all(text.as_bytes())?)
}

/// Reads one line, byte by byte: what follows on the stream belongs to the lane.
fn receive(stream: &mut TcpStream) -> anyhow::Result<String> {
    let mut line = String::new();
    BufReader::with_capacity(1, stream.take(MAX_LINE)).read_line(&mut line)?;
    if !line.ends_with('\n') {
        bail!("the peer closed the connection or does not speak this protocol");
    }
    Ok(line)
}

/// Lanes that are awaited, by name.
type Awaited = Arc<Mutex<HashMap<String, Sender<TcpStream>>>>;

pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let listener = TcpListener::bind(&args.listen)
        .with_context(|| format!("cannot listen on {}; choose another address with --listen", args.listen))?;
    let memory = HostMemory::anonymous("pcbench", REGION_BYTES as usize).context("making memory to read")?;
    pattern::fill(&memory);
    eprintln!("pcbench: serving {} MiB on {}", REGION_BYTES >> 20, listener.local_addr()?);
    let awaited = Awaited::default();
    for stream in listener.incoming() {
        let (memory, awaited, device) = (memory.clone(), awaited.clone(), args.device.clone());
        std::thread::spawn(move || {
            let peer = stream.as_ref().ok().and_then(|stream| stream.peer_addr().ok());
            let ended =
                stream.map_err(Into::into).and_then(|stream| attend(stream, &memory, &awaited, &device));
            if let Err(error) = ended {
                eprintln!("pcbench: {peer:?}: {error:#}");
            }
        });
    }
    Ok(())
}

fn attend(
    mut stream: TcpStream,
    memory: &HostMemory,
    awaited: &Awaited,
    device: &DeviceArgs,
) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    match from_str(&receive(&mut stream)?).context("no line of ours")? {
        Hello::Lane { name } => {
            let lane = awaited.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            stream.set_read_timeout(None)?;
            lane.context("a lane that nobody awaits")?.send(stream)?;
            Ok(())
        }
        Hello::Read { version, transport, request } => {
            let offered = offer(&stream, memory, device, version, &transport, &request);
            let (mut exporter, answer) = match offered {
                Ok(offered) => offered,
                Err(error) => return send(&mut stream, &Answer::Refused(format!("{error:#}"))),
            };
            attend_reader(stream, &mut exporter, answer, awaited)
        }
    }
}

/// Opens the memory to one reader.
fn offer(
    stream: &TcpStream,
    memory: &HostMemory,
    device: &DeviceArgs,
    version: u32,
    transport: &str,
    request: &[u8],
) -> anyhow::Result<(Exporter, Answer)> {
    if version != VERSION {
        bail!(
            "it speaks version {version} of pcbench, this side {VERSION}; use the same release on both sides"
        );
    }
    let transport: Transport = transport.parse().map_err(anyhow::Error::msg)?;
    let local = stream.local_addr().ok().map(|address| address.ip());
    let mut exporter = Exporter::new(transport, std::slice::from_ref(memory), &device.endpoint(local))?;
    let grant = exporter.grant(request)?;
    let region = exporter.regions()[0].to_bytes().to_vec();
    let lane = format!("{:016x}{:016x}", getrandom::u64()?, getrandom::u64()?);
    Ok((exporter, Answer::Granted { region, grant, lane }))
}

/// Keeps a reader's lane open until its connection closes.
fn attend_reader(
    mut stream: TcpStream,
    exporter: &mut Exporter,
    answer: Answer,
    awaited: &Awaited,
) -> anyhow::Result<()> {
    let (sender, lane) = channel();
    if let Answer::Granted { lane: name, .. } = &answer {
        awaited.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), sender);
    }
    send(&mut stream, &answer)?;
    while exporter.awaited() > 0 {
        exporter.attach(lane.recv_timeout(PATIENCE).context("its lane did not come")?)?;
    }
    stream.set_read_timeout(None)?;
    std::io::copy(&mut stream, &mut std::io::sink())?;
    Ok(())
}

/// A reader's side: a lane into the memory that is served at `host`.
pub(crate) struct Remote {
    pub(crate) lane: AnyLane,
    pub(crate) region: RemoteRegion,
    /// To be held: the server closes the lane when this closes.
    pub(crate) control: TcpStream,
}

/// Connects a lane of `importer` to a server.
pub(crate) fn connect(
    mut control: TcpStream,
    transport: Transport,
    importer: &Importer,
) -> anyhow::Result<Remote> {
    control.set_read_timeout(Some(PATIENCE))?;
    let peer = control.peer_addr()?;
    let (pending, request) = importer.request(LaneClass::Urgent)?;
    send(&mut control, &Hello::Read { version: VERSION, transport: transport.name().into(), request })?;
    let answer =
        receive(&mut control).with_context(|| format!("{peer} does not answer; is it `pcbench serve`?"))?;
    let (region, grant, name) =
        match from_str(&answer).with_context(|| format!("{peer} is no `pcbench serve`"))? {
            Answer::Granted { region, grant, lane } => (region, grant, lane),
            Answer::Refused(reason) => bail!("{peer} refused: {reason}"),
        };
    let mut streams = Vec::new();
    for _ in 0..pending.streams() {
        let mut stream = TcpStream::connect(peer)?;
        send(&mut stream, &Hello::Lane { name: name.clone() })?;
        streams.push(stream);
    }
    let region: [u8; 24] = region.try_into().ok().context("the server's region is malformed")?;
    let lane = importer.connect(pending, &grant, streams)?;
    Ok(Remote { lane, region: RemoteRegion::from_bytes(region), control })
}
