package pubsub

import "time"

// settleLag is how long a row may stay invisible after a row with a higher id
// was claimed, because the transaction that inserted it commits later, and
// still be found without a sweep.
const settleLag = 200 * time.Millisecond

// sqlCursor says from which id on a claim looks for messages. Deleted rows stay
// in the index until they are vacuumed, which an open transaction anywhere in
// the database can prevent for hours. A claim that began with the first id
// would step over all of them, each time. So a claim begins where the claims of
// a moment ago ended, and only a sweep, once in a while, at the beginning: it
// finds what came late and what other processes left behind.
type sqlCursor struct {
	low, next, high int64     // begin here; begin here after the next turn; last id that was claimed
	turned          time.Time // when next became low

	sweepAt  time.Time // when the next sweep is due
	sweeping bool
	begun    time.Time
}

// start returns the id after which a claim begins to look.
func (c *sqlCursor) start(now time.Time) int64 {
	c.begun = now
	c.sweeping = !now.Before(c.sweepAt)
	if c.sweeping {
		return 0
	}
	if now.Sub(c.turned) >= settleLag {
		c.low, c.next, c.turned = c.next, c.high, now
	}
	return c.low
}

// claimed is called after the claim with its last id, 0 if there was none, and
// whether there may be more.
func (c *sqlCursor) claimed(now time.Time, last int64, full bool) {
	if !c.sweeping {
		c.high = max(c.high, last)
		return
	}
	// A sweep that takes long must not be all that is done.
	c.sweepAt = now.Add(max(pollEvery, 10*now.Sub(c.begun)))
	if full { // what it did not come to lies before the other claims' end
		c.low, c.next, c.high = last, last, last
		return
	}
	c.high = max(c.high, last)
}

// failed is called after a claim that failed, maybe because it took too long. A
// sweep is not tried again at once: the other claims must go on.
func (c *sqlCursor) failed(now time.Time) {
	if c.sweeping {
		c.sweepAt = now.Add(max(pollEvery, 10*now.Sub(c.begun)))
	}
}

// rewind makes the next claims find a row that is due again.
func (c *sqlCursor) rewind(id int64) {
	c.low, c.next = min(c.low, id-1), min(c.next, id-1)
}
