//! Asking a completion queue for an event, and taking events back: the two verbs that the binding
//! has no safe form of.

use rdma_mummy_sys::{ibv_ack_cq_events, ibv_get_cq_event, ibv_req_notify_cq};
use sideway::ibverbs::completion::{BasicCompletionQueue, CompletionChannel, CompletionQueue};

/// Asks for an event at the next completion.
pub(crate) fn request(queue: &BasicCompletionQueue) -> std::io::Result<()> {
    // SAFETY: the pointer is used only in this call, while `queue` is borrowed.
    let raw = unsafe { queue.cq() };
    // SAFETY: `raw` is a live completion queue created with a completion channel.
    match unsafe { ibv_req_notify_cq(raw.as_ptr(), 0) } {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)),
    }
}

/// Takes every pending event from the channel, which must not block, and acknowledges it. Says
/// whether there was one.
pub(crate) fn drain(channel: &CompletionChannel) -> bool {
    let mut any = false;
    let mut queue = std::ptr::null_mut();
    let mut context = std::ptr::null_mut();
    // SAFETY: the pointer is used only in this call, while `channel` is borrowed.
    let raw = unsafe { channel.comp_channel() };
    loop {
        // SAFETY: `raw` is a live, non-blocking channel and both targets are valid for writing.
        let code = unsafe { ibv_get_cq_event(raw.as_ptr(), &mut queue, &mut context) };
        if code != 0 {
            return any;
        }
        any = true;
        // SAFETY: the event was just delivered for this queue and is acknowledged once.
        unsafe { ibv_ack_cq_events(queue, 1) };
    }
}
